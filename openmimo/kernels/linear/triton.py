"""Block-scaled weights on an accelerator: codes are read as they are stored, and for few rows each once.

R rows, D input dim, O output dim.
"""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import LinearNeed, WeightAndBias
from openmimo.kernels.weights import FP8, INT8, BlockScaled


def run(x_RD: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`."""
    from openmimo.kernels.linear._triton import MAX_WEIGHTS, multiply

    outputs = []
    for first in range(0, len(layers), MAX_WEIGHTS):
        weights = [weight_OD for weight_OD, _ in layers[first : first + MAX_WEIGHTS]]
        outputs.append(multiply(x_RD, tuple(weight for weight in weights if isinstance(weight, BlockScaled))))
    out_RO = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    start = 0
    for weight_OD, bias_O in layers:
        stop = start + weight_OD.shape[0]
        if bias_O is not None:
            out_RO[:, start:stop] += bias_O
        start = stop
    return out_RO


def refuse(need: LinearNeed) -> str | None:
    """A matrix of 16-bit numbers on an accelerator, int8 with one scale for each output or fp8, without gradients."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.weight_format not in (INT8, FP8):
        return f"its weights are int8 with a scale for each output or fp8, not {need.weight_format}"
    if need.dtype == torch.float32:
        return "it multiplies numbers of 16 bits"
    if need.needs_gradients:
        return "it has no backward pass"
    if not need.num_rows:
        return "it takes a matrix with rows"
    if need.input_dim % 2:
        return f"it reads codes in pairs, and a row has {need.input_dim}"
    return None if need.readable else "a weight or bias is not contiguous, or does not fit the rows"


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
