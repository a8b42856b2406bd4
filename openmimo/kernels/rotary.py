"""Rotary position embedding over the leading dims of each head (arXiv 2104.09864).

T tokens, H heads, K head dim, R rotary dim (R <= K, even). Dim i turns with dim i + R/2 inside the first R dims.
"""

import functools
import struct
from typing import Any

import torch

from openmimo.kernels import native

_MAX_NATIVE_NUMBERS = 1 << 18  # more are worth torch's threads
_CALL = struct.Struct("4P8q")  # `rotary_call` of native/rows.c


def rotary_table(
    positions_T: torch.Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [T, R] in `dtype`, of position * theta^(-2i/R); computed in float32, or float64 for float64.

    The second half of a row repeats the first. Raises ValueError if `rotary_dim` is odd.
    """
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be even")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, rotary_dim, 2, dtype=wide, device=positions_T.device) / rotary_dim
    frequencies = 1.0 / theta**exponents
    angles_TR = (positions_T.to(wide)[:, None] * frequencies).repeat(1, 2)
    return angles_TR.cos().to(dtype), angles_TR.sin().to(dtype)


def apply_rotary(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """`x_THK` with its first R dims turned by the angles of its token, in its own dtype; dims from R on are untouched.

    Differentiable in x. The table must be in the dtype of x.
    """
    if torch.is_grad_enabled():
        return _Rotate.apply(x_THK, cos_TR, sin_TR)
    if x_THK.is_cpu and x_THK.numel() <= _MAX_NATIVE_NUMBERS and _is_readable(x_THK, cos_TR, sin_TR):
        return _native_rotate(x_THK, cos_TR, sin_TR)
    return _rotate(x_THK, cos_TR, sin_TR)


def _is_readable(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> bool:
    """Whether the native kernel is there and can read these by address."""
    return (
        x_THK.dtype in native.DTYPES
        and x_THK.dtype == cos_TR.dtype
        and x_THK.stride(2) == cos_TR.stride(1) == 1
        and cos_TR.shape == sin_TR.shape
        and cos_TR.stride() == sin_TR.stride()
        and cos_TR.shape[0] == x_THK.shape[0]
        and native.library() is not None
    )


def _native_rotate(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    T, H, K = x_THK.shape
    out_THK = x_THK.new_empty(T, H, K)
    row_stride, head_stride, _ = x_THK.stride()
    call = _CALL.pack(
        x_THK.data_ptr(),
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        out_THK.data_ptr(),
        *(T, H, K, cos_TR.shape[1], row_stride, head_stride, cos_TR.stride(0), x_THK.dtype == torch.bfloat16),
    )
    _entry()(call)
    return out_THK


@functools.cache
def _entry() -> native.Entry:
    return native.entry("openmimo_rotary")


class _Rotate(torch.autograd.Function):
    """A rotation by -angle is the gradient of a rotation by angle, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        return _rotate(x_THK, cos_TR, sin_TR)

    @staticmethod
    def backward(ctx: Any, grad_THK: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return _rotate(grad_THK, cos_TR, -sin_TR), None, None


def _rotate(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    half = cos_TR.shape[-1] // 2
    cos, sin = cos_TR[:, None, :half], sin_TR[:, None, :half]
    first, second, rest = x_THK[..., :half], x_THK[..., half : 2 * half], x_THK[..., 2 * half :]
    turned_first = torch.addcmul(first * cos, second, sin, value=-1)
    return torch.cat([turned_first, torch.addcmul(second * cos, first, sin), rest], dim=-1)
