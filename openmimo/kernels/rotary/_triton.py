"""The Triton kernel of rotary embeddings: a program for each token."""

import torch
import triton
import triton.language as tl


def rotate_heads(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Arguments as in `openmimo.kernels.operations.apply_rotary`."""
    T, H, K = x_THK.shape
    half = cos_TR.shape[1] // 2
    out_THK = x_THK.new_empty(T, H, K)
    _rotate[(T,)](
        x_THK, cos_TR, sin_TR, out_THK, x_THK.stride(0), x_THK.stride(1), cos_TR.stride(0), H,
        HEADS_PAD=triton.next_power_of_2(H), K=K, HALF=half, HALF_PAD=triton.next_power_of_2(max(half, 1)),
        REST_PAD=triton.next_power_of_2(max(K - 2 * half, 1)),
    )  # fmt: skip
    return out_THK


@triton.jit
def _rotate(
    x, cos, sin, out, stride_t, stride_h, stride_table, num_heads,
    HEADS_PAD: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    heads = tl.arange(0, HEADS_PAD)[:, None]
    rows, out_rows = x + token * stride_t + heads * stride_h, out + (token * num_heads + heads) * K
    dims = tl.arange(0, HALF_PAD)[None, :]
    is_pair = (heads < num_heads) & (dims < HALF)
    dtype = x.dtype.element_ty
    c = tl.load(cos + token * stride_table + dims, mask=dims < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * stride_table + dims, mask=dims < HALF, other=0.0).to(tl.float32)
    first = tl.load(rows + dims, mask=is_pair, other=0.0).to(tl.float32)
    second = tl.load(rows + HALF + dims, mask=is_pair, other=0.0).to(tl.float32)
    # the first product is rounded to the dtype, as in the reference
    turned_first = (first * c).to(dtype).to(tl.float32) - second * s
    turned_second = (second * c).to(dtype).to(tl.float32) + first * s
    tl.store(out_rows + dims, turned_first.to(dtype), mask=is_pair)
    tl.store(out_rows + HALF + dims, turned_second.to(dtype), mask=is_pair)
    if 2 * HALF < K:
        rest = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        is_rest = (heads < num_heads) & (rest < K)
        tl.store(out_rows + rest, tl.load(rows + rest, mask=is_rest, other=0.0), mask=is_rest)
