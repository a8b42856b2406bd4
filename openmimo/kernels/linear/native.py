"""Few rows on a CPU, limited by the memory bandwidth of reading the weights (native/linear.c).

Batch invariance: a row of the output has the same bits in every call that computes it. A token therefore has the same
result if it is decoded alone, in a batch, or verified as a draft.
"""

import functools

import torch

from openmimo.kernels import native
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import LinearNeed, WeightAndBias
from openmimo.kernels.weights import PLAIN

MAX_ROWS = 32  # equal to the limit in native/linear.c


def run(x_RD: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`.

    Raises:
        MemoryError: A buffer cannot be allocated.
    """
    rows, dims = x_RD.shape
    if x_RD.stride(1) != 1:
        x_RD = x_RD.contiguous()
    outputs = 0
    parts: list[int] = []
    for weight_OD, bias_O in layers:
        assert isinstance(weight_OD, torch.Tensor)
        outputs += weight_OD.shape[0]
        parts += weight_OD.data_ptr(), 0 if bias_O is None else bias_O.data_ptr(), weight_OD.shape[0]
    out_RO = x_RD.new_empty(rows, outputs)
    function = _function(len(layers))
    call = function.pack(
        x_RD.data_ptr(),
        out_RO.data_ptr(),
        *(rows, dims, x_RD.stride(0), outputs, len(layers), torch.get_num_threads(), x_RD.dtype == torch.bfloat16),
        *parts,
    )
    if function.call(call):
        raise MemoryError(f"there is no memory for {rows} rows of {dims} numbers")
    return out_RO


@functools.cache
def _function(num_parts: int) -> native.Function:
    """Return the C function with the `linear_call` struct for this number of weights."""
    return native.Function("openmimo_linear", "2P7q" + num_parts * "2Pq")


def refuse(need: LinearNeed) -> str | None:
    """Refuse all but a few rows of float32 or bfloat16 on a CPU, without gradients."""
    if need.weight_format != PLAIN:
        return f"its weights are plain, not {need.weight_format}"
    if need.num_rows is None or not 1 <= need.num_rows <= MAX_ROWS:
        return f"it takes a matrix of 1 to {MAX_ROWS} rows"
    if not need.readable:
        return "a weight or bias is not contiguous, or does not have the dtype and size that x requires"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
