"""Few rows on an accelerator: the weights are read once, and joined layers write to one result.

R rows, D input dim, O output dim.
"""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import LinearNeed, WeightAndBias
from openmimo.kernels.weights import PLAIN

_MAX_ROWS = 64  # above, the products of the library are faster


def run(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`."""
    from openmimo.kernels.linear._triton import multiply_rows

    return multiply_rows(x, layers)


def refuse(need: LinearNeed) -> str | None:
    """A matrix of few rows, plain weights, without gradients."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.weight_format != PLAIN:
        return f"its weights are plain, not {need.weight_format}"
    if need.needs_gradients:
        return "it has no backward pass"
    if need.num_rows is None or not 1 <= need.num_rows <= _MAX_ROWS:
        return f"it takes 1 to {_MAX_ROWS} rows, not {need.num_rows}"
    return None if need.readable else "weights or biases do not have the sizes or the dtype of x"


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
