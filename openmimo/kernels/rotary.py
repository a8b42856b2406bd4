"""Rotary position embedding over the leading dims of each head (arXiv 2104.09864).

T tokens, H heads, K head dim, R rotary dim (R <= K, even). Dim i turns with dim i + R/2 inside the first R dims.
"""

from typing import Any

import torch


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
    return _rotate(x_THK, cos_TR, sin_TR)


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
