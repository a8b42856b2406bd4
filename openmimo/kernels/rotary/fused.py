"""The definition as one autograd function: the gradient of a rotation by an angle is the rotation by its negative.

The backward pass needs the tables only; x is not saved.
"""

from typing import Any

import torch

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.rotary.reference import run as rotate


def run(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_rotary`."""
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
