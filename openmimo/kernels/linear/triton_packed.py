"""Packed weights on an accelerator: a few rows of int8 numbers times bits, summed in int32 by the matrix units.

Not yet run on a GPU, so the priority is below that of `dequantized`: only the name asks for it.
"""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import LinearNeed, WeightAndBias
from openmimo.kernels.weights import PACKED, Packed

MAX_ROWS = 128  # each tile of rows takes the bits apart once more; above, weights are dequantized for torch's product


def run(x_RD: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`."""
    from openmimo.kernels.linear._triton_packed import multiply

    out_RO = multiply(x_RD, [weight_OD for weight_OD, _ in layers if isinstance(weight_OD, Packed)])
    start = 0
    for weight_OD, bias_O in layers:
        stop = start + weight_OD.shape[0]
        if bias_O is not None:
            out_RO[:, start:stop] += bias_O
        start = stop
    return out_RO


def refuse(need: LinearNeed) -> str | None:
    """Refuse all but a few rows on an accelerator with packed weights, without gradients."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.weight_format not in PACKED:
        return f"its weights are packed, not {need.weight_format}"
    if need.needs_gradients:
        return "it has no backward pass"
    if need.num_rows is None or not 1 <= need.num_rows <= MAX_ROWS:
        return f"it takes a matrix of 1 to {MAX_ROWS} rows"
    return None if need.readable else "a weight or bias is not contiguous, or does not fit the rows"


PLUGIN = Backend(priority=10, run=run, refuse=refuse)
