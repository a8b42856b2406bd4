"""One kernel that reads each row once, without gradients."""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import NormNeed

_MAX_NUMBERS = 1 << 30  # offsets of 32 bits


def run(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.rms_norm`."""
    from openmimo.kernels.norm._triton import normalize_rows

    return normalize_rows(x, weight, epsilon)


def refuse(need: NormNeed) -> str | None:
    """Inference on an accelerator."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients:
        return "it has no backward pass"
    if not 0 < need.num_numbers < _MAX_NUMBERS:
        return f"it takes 1 to {_MAX_NUMBERS} numbers, not {need.num_numbers}"
    return None if need.readable else "the weight does not fit the rows"


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
