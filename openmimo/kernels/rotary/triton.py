"""One kernel that rotates and copies all heads of a token, without gradients."""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import RotaryNeed

_MAX_NUMBERS = 1 << 30  # offsets of 32 bits


def run(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_rotary`."""
    from openmimo.kernels.rotary._triton import rotate_heads

    return rotate_heads(x_THK, cos_TR, sin_TR)


def refuse(need: RotaryNeed) -> str | None:
    """Inference on an accelerator."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients:
        return "it has no backward pass"
    if not 0 < need.num_numbers < _MAX_NUMBERS:
        return f"it takes 1 to {_MAX_NUMBERS} numbers, not {need.num_numbers}"
    return None if need.readable else "heads or tables are not contiguous"


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
