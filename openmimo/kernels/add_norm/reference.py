"""The definition: a sum, then the normalization by its own fastest backend. Gradients are those of both."""

import torch

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import rms_norm


def run(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `openmimo.kernels.operations.add_rms_norm`."""
    total = x + added
    return total, rms_norm(total, weight, epsilon)


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
