"""The definition, with the gradients of autograd."""

import torch

from openmimo.kernels.dispatch import Backend


def run(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_rotary`."""
    half = cos_TR.shape[-1] // 2
    cos, sin = cos_TR[:, None, :half], sin_TR[:, None, :half]
    first, second, rest = x_THK[..., :half], x_THK[..., half : 2 * half], x_THK[..., 2 * half :]
    turned_first = torch.addcmul(first * cos, second, sin, value=-1)
    return torch.cat([turned_first, torch.addcmul(second * cos, first, sin), rest], dim=-1)


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
