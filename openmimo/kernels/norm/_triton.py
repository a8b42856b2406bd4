"""The Triton kernel of the RMS norm: a program for each row."""

import torch
import triton
import triton.language as tl


def normalize_rows(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Arguments as in `openmimo.kernels.operations.rms_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    D = x.shape[-1]
    _normalize[(x.numel() // D,)](x, weight, out, D, epsilon, PAD=triton.next_power_of_2(D))
    return out


@triton.jit
def _normalize(x, weight, out, D, epsilon, PAD: tl.constexpr):
    row = tl.program_id(0)
    dims = tl.arange(0, PAD)
    numbers = tl.load(x + row * D + dims, mask=dims < D, other=0.0)
    wide = numbers.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / D + epsilon)
    # rounded before the product with the weight, as transformers does
    normalized = (wide * scale).to(numbers.dtype)
    tl.store(out + row * D + dims, normalized * tl.load(weight + dims, mask=dims < D, other=0.0), mask=dims < D)
