"""Few rows on a CPU with int8 weights of one scale per output (native/int8.c), which read half the bytes of bfloat16.

Sums are float32. A row of the output has the same bits in every batch.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import LinearNeed, WeightAndBias
from openmimo.kernels.weights import INT8, BlockScaled

MAX_ROWS = 32  # equal to the limit in native/int8.c
_INT8_LINEAR = native.Function("openmimo_int8_linear", "4P5q")  # `int8_call` of native/int8.c
_FLOAT32_BYTES = 4


def run(x_RD: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`."""
    rows, dims = x_RD.shape
    dtype, threads = x_RD.dtype, torch.get_num_threads()
    x_RD = x_RD.float().contiguous()
    outputs = sum([weight_OD.shape[0] for weight_OD, _ in layers])
    out_RO = x_RD.new_empty(rows, outputs)
    x_address, out_address = x_RD.data_ptr(), out_RO.data_ptr()
    for weight_OD, _ in layers:
        assert isinstance(weight_OD, BlockScaled)
        codes_OD, width = weight_OD.codes, weight_OD.codes.shape[0]
        scales = weight_OD.scales.data_ptr()
        _INT8_LINEAR.call(
            _INT8_LINEAR.pack(x_address, codes_OD.data_ptr(), scales, out_address, rows, dims, width, outputs, threads)
        )
        out_address += width * _FLOAT32_BYTES
    out_RO = out_RO.to(dtype)
    start = 0
    for weight_OD, bias_O in layers:
        if bias_O is not None:
            out_RO[:, start : start + weight_OD.shape[0]] += bias_O
        start += weight_OD.shape[0]
    return out_RO


def refuse(need: LinearNeed) -> str | None:
    """Refuse all but a few rows of float32 or bfloat16 on a CPU with int8 weights, without gradients."""
    if need.weight_format != INT8:
        return f"its weights are int8 with a scale for each output, not {need.weight_format}"
    if need.num_rows is None or not 1 <= need.num_rows <= MAX_ROWS:
        return f"it takes a matrix of 1 to {MAX_ROWS} rows"
    if not need.readable:
        return "a weight or bias is not contiguous, or does not have the sizes that x requires"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
