"""Root-mean-square normalisation."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x [..., D] over its root mean square, times weight [D]; statistics in float32, weight applied after the cast back."""
    wide = x if x.dtype == torch.float64 else x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return normalised.to(x.dtype) * weight.to(x.dtype)
