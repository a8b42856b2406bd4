"""The definition, with the gradients of autograd."""

import torch

from openmimo.kernels.dispatch import Backend


def run(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.rms_norm`; the weight has the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    quotient = wide * (wide.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
    return quotient.to(x.dtype) * weight


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
