"""Rotary position embedding over the leading dims of a head."""

import torch


def rotary_table(
    positions_T: torch.Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, rotary_dim] in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent_R = torch.arange(0, rotary_dim, 2, device=positions_T.device, dtype=wide) / rotary_dim
    angle_TR = positions_T.to(wide)[:, None] * theta**-exponent_R
    angle_TR = torch.cat([angle_TR, angle_TR], dim=-1)
    return angle_TR.cos().to(dtype), angle_TR.sin().to(dtype)


def apply_rotary(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotates the first R dims of each head, dim i with dim i + R/2; the others pass."""
    rotary_dim = cos_TR.shape[-1]
    rotated, passed = x_THK[..., :rotary_dim], x_THK[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = rotated * cos_TR[:, None] + turned * sin_TR[:, None]
    return torch.cat([rotated, passed], dim=-1)
