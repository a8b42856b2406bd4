"""Rotary position embedding over the leading dims of each head (arXiv 2104.09864).

T tokens, H heads, K head dim, R rotary dim (R <= K, even). Dim i is rotated with dim i + R/2, for i < R/2.
"""

from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher

DISPATCHER = Dispatcher("openmimo.kernels.rotary", "OPENMIMO_ROTARY")


class RotaryNeed(NamedTuple):
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        num_numbers: Number of elements of x.
        dtype: Dtype of x.
        needs_gradients: Whether autograd records, as in `NormNeed`.
        readable: Whether both tables have the dtype and number of rows of x and equal strides, and the heads of x and
            the rows of the tables are contiguous.
        on_cpu: Whether x is in CPU memory.
    """

    num_numbers: int
    dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool


def rotary_table(
    positions_T: torch.Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [T, R] in `dtype`, of position * theta^(-2i/R); computed in float32, or float64 for float64.

    The second half of a row repeats the first.

    Raises:
        ValueError: `rotary_dim` is odd.
    """
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be even")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, rotary_dim, 2, dtype=wide, device=positions_T.device) / rotary_dim
    frequencies = 1.0 / theta**exponents
    angles_TR = (positions_T.to(wide)[:, None] * frequencies).repeat(1, 2)
    return angles_TR.cos().to(dtype), angles_TR.sin().to(dtype)


def apply_rotary(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dims of `x_THK` by the angles of each token; the other dims are copied.

    The tables must have the dtype of x, which the result has as well. Differentiable in x.
    """
    dtype = x_THK.dtype
    readable = (
        dtype == cos_TR.dtype
        and x_THK.stride(2) == cos_TR.stride(1) == 1
        and cos_TR.shape == sin_TR.shape
        and cos_TR.stride() == sin_TR.stride()
        and cos_TR.shape[0] == x_THK.shape[0]
    )
    need = RotaryNeed(x_THK.numel(), dtype, torch.is_grad_enabled(), readable, x_THK.is_cpu)
    return DISPATCHER.choose(need)[1].run(x_THK, cos_TR, sin_TR)
