"""The Triton kernel of linear layers with few rows: a program for a tile of outputs, which loops over the rows.

The result of a row does not depend on the other rows.
"""

import torch
import triton
import triton.language as tl

from openmimo.kernels.operations import WeightAndBias
from openmimo.kernels.weights import BlockScaled

_TILE_ROWS = 16
_TILE_OUTPUTS = 16  # many small tiles keep more bytes in flight than few large ones


def multiply_rows(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Arguments as in `openmimo.kernels.operations.joined_linear`; x is [R, D]."""
    R, D = x.shape
    x = x.contiguous()
    width = sum(weight.shape[0] for weight, _ in layers)
    out = x.new_empty(R, width)
    first = 0
    for weight_OD, bias_O in layers:
        assert not isinstance(weight_OD, BlockScaled), "refused"
        num_outputs = weight_OD.shape[0]
        _multiply[(triton.cdiv(num_outputs, _TILE_OUTPUTS),)](
            x, weight_OD, bias_O, out, R, num_outputs, D, first, width,
            TILE_ROWS=_TILE_ROWS, TILE=_TILE_OUTPUTS, BLOCK=min(256, max(16, triton.next_power_of_2(D))),
            HAS_BIAS=bias_O is not None, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=4, num_stages=4,
        )  # fmt: skip
        first += num_outputs
    return out


@triton.jit
def _multiply(
    x, weight, bias, out, num_rows, num_outputs, D, first, width,
    TILE_ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_column = columns < num_outputs
    weight_rows = weight + columns.to(tl.int64)[None, :] * D
    for start_row in range(0, num_rows, TILE_ROWS):
        rows = start_row + tl.arange(0, TILE_ROWS)
        is_row = rows < num_rows
        total = tl.zeros((TILE_ROWS, TILE), tl.float32)
        for start in range(0, D, BLOCK):
            dims = start + tl.arange(0, BLOCK)
            numbers = tl.load(
                x + rows[:, None] * D + dims[None, :], mask=is_row[:, None] & (dims < D)[None, :], other=0.0
            )
            tile = tl.load(weight_rows + dims[:, None], mask=(dims < D)[:, None] & is_column[None, :], other=0.0)
            total += tl.dot(numbers, tile, input_precision=PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        place = out + rows[:, None] * width + first + columns[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
