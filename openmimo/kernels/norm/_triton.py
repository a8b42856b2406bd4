"""The Triton kernels of the RMS norm, of a tensor or of the sum of two: a program for each row."""

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


def add_and_normalize_rows(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments as in `openmimo.kernels.operations.add_rms_norm`."""
    x, added, weight = x.contiguous(), added.contiguous(), weight.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    D = x.shape[-1]
    _add_and_normalize[(x.numel() // D,)](
        x, added, weight, total, out, D, epsilon, PAD=triton.next_power_of_2(D), num_warps=8 if D > 2048 else 4
    )
    return total, out


@triton.jit
def _normalized(numbers, weight, D, epsilon):
    """The normalized row, rounded before the product with the weight, as transformers does."""
    wide = numbers.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / D + epsilon)
    return (wide * scale).to(numbers.dtype) * weight


@triton.jit
def _normalize(x, weight, out, D, epsilon, PAD: tl.constexpr):
    row = tl.program_id(0)
    dims = tl.arange(0, PAD)
    numbers = tl.load(x + row * D + dims, mask=dims < D, other=0.0)
    result = _normalized(numbers, tl.load(weight + dims, mask=dims < D, other=0.0), D, epsilon)
    tl.store(out + row * D + dims, result, mask=dims < D)


@triton.jit
def _add_and_normalize(x, added, weight, total, out, D, epsilon, PAD: tl.constexpr):
    row = tl.program_id(0)
    dims = tl.arange(0, PAD)
    mask = dims < D
    numbers = tl.load(x + row * D + dims, mask=mask, other=0.0)
    wide = numbers.to(tl.float32) + tl.load(added + row * D + dims, mask=mask, other=0.0).to(tl.float32)
    numbers = wide.to(numbers.dtype)  # the residual stream, from whose rounded values the norm follows
    tl.store(total + row * D + dims, numbers, mask=mask)
    result = _normalized(numbers, tl.load(weight + dims, mask=mask, other=0.0), D, epsilon)
    tl.store(out + row * D + dims, result, mask=mask)
