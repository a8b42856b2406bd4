"""Few rows on a CPU with packed weights: sums of int8 inputs without multiplications (native/packed.c).

A row of the output has the same bits in every batch.

R rows, D input dim, O output dim.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import LinearNeed, WeightAndBias
from openmimo.kernels.weights import BINARY, FAIRY, FAIRY2I, PACKED, TERNARY, Packed

MAX_ROWS = 32  # equal to the limit in native/packed.c
_PACKED_LINEAR = native.Function("openmimo_packed_linear", "4P8q")  # `packed_call` of native/packed.c
_FORMATS = {BINARY: 0, TERNARY: 1, FAIRY: 2, FAIRY2I: 3}
_FLOAT32_BYTES = 4


def run(x_RD: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`.

    Raises:
        MemoryError: A buffer cannot be allocated.
    """
    rows, dims = x_RD.shape
    dtype, threads = x_RD.dtype, torch.get_num_threads()
    x_RD = x_RD.float().contiguous()
    outputs = sum([weight_OD.shape[0] for weight_OD, _ in layers])
    out_RO = x_RD.new_empty(rows, outputs)
    x_address, out_address = x_RD.data_ptr(), out_RO.data_ptr()
    for weight_OD, _ in layers:
        assert isinstance(weight_OD, Packed)
        packing, width = weight_OD.packing, weight_OD.matrix_shape[0]
        codes, scales = weight_OD.codes.data_ptr(), weight_OD.scales.data_ptr()
        matrices = len(weight_OD.codes)
        for _ in range(matrices):
            call = _PACKED_LINEAR.pack(
                *(x_address, codes, scales, out_address),
                *(rows, dims, width, outputs, packing.stages, _FORMATS[packing.format], packing.per_row, threads),
            )
            if _PACKED_LINEAR.call(call):
                raise MemoryError(f"there is no memory for {rows} rows of {dims} numbers")
            codes += weight_OD.codes.nbytes // matrices
            scales += weight_OD.scales.nbytes // matrices
            out_address += width * _FLOAT32_BYTES
    out_RO = out_RO.to(dtype)
    start = 0
    for weight_OD, bias_O in layers:
        if bias_O is not None:
            out_RO[:, start : start + weight_OD.shape[0]] += bias_O
        start += weight_OD.shape[0]
    return out_RO


def refuse(need: LinearNeed) -> str | None:
    """Refuse all but a few rows of float32 or bfloat16 on a CPU with packed weights, without gradients."""
    if need.weight_format not in PACKED:
        return f"its weights are packed, not {need.weight_format}"
    if need.num_rows is None or not 1 <= need.num_rows <= MAX_ROWS:
        return f"it takes a matrix of 1 to {MAX_ROWS} rows"
    if not need.readable:
        return "a weight or bias is not contiguous, or does not have the sizes that x requires"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
