"""The definition as one autograd function: a rotation by -angle is the gradient of a rotation by angle.

Nothing of x is kept for the backward pass.
"""

from typing import Any

import torch

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.rotary.reference import run as rotate


def run(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """The call `openmimo.kernels.rotary.apply_rotary`."""
    return _Rotate.apply(x_THK, cos_TR, sin_TR)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        return rotate(x_THK, cos_TR, sin_TR)

    @staticmethod
    def backward(ctx: Any, grad_THK: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return rotate(grad_THK, cos_TR, -sin_TR), None, None


PLUGIN = Backend(
    priority=50,
    run=run,
    refuse=lambda need: None if need.needs_gradients else "without gradients it adds only overhead to the reference",
)
