"""Triton kernels of FP8 training, for Hopper: codes with their scales, and block-scaled products in groups.

Not yet run on a GPU. Every number of a result has one writer, and there are no atomics.

    quantize          a program for 128 x 128 numbers: it reads them once and writes both codes
    quantize_weight   a program for a block of 128 x 128
    multiply          a program for 128 rows x 128 outputs; of each 128 summed dims, the tensor cores' sum is scaled
                      and added in float32, since their own sums have fewer bits (arXiv 2412.19437, section 3.3.2)
    weight_gradient   the same for 128 x 128 numbers of the gradient of an expert, over the rows of the expert
    gate              silu(gate) * up and the codes of all three, so that no wide copy of them is written

The tensor cores take 8-bit operands whose summed dim is contiguous. Therefore the codes along the rows are stored
transposed, and so are those of the weight for the input gradient. Scales of rows lie in the order of the rows.

P rows, C and O the dims of a weight [O, C], K summed dim, N output dim, F expert hidden dim.
"""

import torch
import triton
import triton.language as tl

from openmimo.kernels.linear._triton_float8 import in_assembly
from openmimo.kernels.weights import FP8_BLOCK, FP8_LEAST, FP8_MAX, BlockScaled, Float8Latent

_MOST, _LEAST = tl.constexpr(FP8_MAX), tl.constexpr(FP8_LEAST)
_WARPS, _STAGES = 8, 4
_QUANTIZE_WARPS = 16
_GATE_ROWS = 32


def quantize(
    rows_NC: torch.Tensor, places_P: torch.Tensor | None, with_transposed: bool
) -> tuple[BlockScaled, BlockScaled | None]:
    """Implement `Float8Functions.quantize`."""
    rows_NC = rows_NC.contiguous()
    P, C = len(rows_NC) if places_P is None else len(places_P), rows_NC.shape[1]
    rows = _empty(P, C, rows_NC.device)
    columns = _empty(C, P, rows_NC.device) if with_transposed else None
    written = rows if columns is None else columns
    _quantize[(triton.cdiv(P, FP8_BLOCK), C // FP8_BLOCK)](
        rows_NC, places_P, rows.codes, rows.scales, written.codes, written.scales, P, C, *_strides(rows),
        *_strides(written), HAS_PLACES=places_P is not None, WITH_TRANSPOSED=with_transposed, BLOCK=FP8_BLOCK,
        IN_ASSEMBLY=in_assembly(), num_warps=_QUANTIZE_WARPS,
    )  # fmt: skip
    return rows, columns


def quantize_weight(weights: tuple[Float8Latent, ...], transpose: bool) -> BlockScaled:
    """Implement `Float8Functions.quantize_weight`."""
    stacked = [weight.tensor if weight.tensor.dim() == 3 else weight.tensor[None] for weight in weights]
    E, C = stacked[0].shape[0], stacked[0].shape[2]
    sizes = [tensor.shape[1] for tensor in stacked]
    shape, device = ((C, sum(sizes)) if transpose else (sum(sizes), C)), stacked[0].device
    codes = torch.empty(E, *shape, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(E, *(size // FP8_BLOCK for size in shape), dtype=torch.float32, device=device)
    first = 0
    for tensor, size in zip(stacked, sizes, strict=True):
        _quantize_weight[(size // FP8_BLOCK, C // FP8_BLOCK, E)](
            tensor.contiguous(), codes, scales, size, C, sum(sizes), first, TRANSPOSE=transpose, BLOCK=FP8_BLOCK,
            IN_ASSEMBLY=in_assembly(), num_warps=_QUANTIZE_WARPS,
        )  # fmt: skip
        first += size
    return BlockScaled(codes, scales, (FP8_BLOCK, FP8_BLOCK))


def multiply(
    rows_PK: BlockScaled, weight_ENK: BlockScaled, ends_E: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Implement `Float8Functions.multiply`."""
    (P, K), (E, N, _) = rows_PK.shape, weight_ENK.shape
    out_PN = torch.empty(P, N, dtype=dtype, device=rows_PK.codes.device)
    _multiply[(N // FP8_BLOCK, triton.cdiv(P, FP8_BLOCK))](
        rows_PK.codes, rows_PK.scales, weight_ENK.codes, weight_ENK.scales, ends_E, out_PN, P, N, K,
        *_strides(rows_PK), NUM_GROUPS=E, GROUPS_PAD=triton.next_power_of_2(E), HAS_GROUPS=ends_E is not None,
        BLOCK=FP8_BLOCK, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out_PN


def weight_gradient(gradient_OP: BlockScaled, input_CP: BlockScaled, ends_E: torch.Tensor | None) -> torch.Tensor:
    """Implement `Float8Functions.weight_gradient`."""
    (O, P), C = gradient_OP.shape, input_CP.shape[0]  # noqa: E741
    E = 1 if ends_E is None else len(ends_E)
    out_EOC = torch.empty(E, O, C, dtype=torch.float32, device=gradient_OP.codes.device)
    _weight_gradient[(C // FP8_BLOCK, O // FP8_BLOCK, E)](
        gradient_OP.codes, gradient_OP.scales, input_CP.codes, input_CP.scales, ends_E, out_EOC, P, O, C,
        *_strides(gradient_OP), *_strides(input_CP), HAS_GROUPS=ends_E is not None, BLOCK=FP8_BLOCK,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out_EOC


def gate(
    gate_up_PH: torch.Tensor, weights_P: torch.Tensor, for_backward: bool
) -> tuple[BlockScaled, BlockScaled | None]:
    """Implement `Float8Functions.gate`."""
    P, H = gate_up_PH.shape
    hidden = _empty(P, H // 2, gate_up_PH.device)
    codes = _empty(P, H, gate_up_PH.device) if for_backward else None
    written = hidden if codes is None else codes
    _gate[(triton.cdiv(P, _GATE_ROWS), H // 2 // FP8_BLOCK)](
        gate_up_PH, weights_P, hidden.codes, hidden.scales, written.codes, written.scales, P, H // 2,
        *_strides(hidden), *_strides(written), FOR_BACKWARD=for_backward, ROWS=_GATE_ROWS, BLOCK=FP8_BLOCK,
        IN_ASSEMBLY=in_assembly(), num_warps=4,
    )  # fmt: skip
    return hidden, codes


def gate_backward(
    gate_up_PH: BlockScaled, weights_P: torch.Tensor, gradient_PF: torch.Tensor, with_transposed: bool
) -> tuple[BlockScaled | None, BlockScaled, BlockScaled | None, torch.Tensor]:
    """Implement `Float8Functions.gate_backward`."""
    (P, H), device = gate_up_PH.shape, gradient_PF.device
    rows = _empty(P, H, device)
    hidden = _empty(H // 2, P, device) if with_transposed else None
    columns = _empty(H, P, device) if with_transposed else None
    some_hidden, some_columns = hidden or rows, columns or rows
    parts = torch.empty(H // 2 // FP8_BLOCK, P, dtype=torch.float32, device=device)
    _gate_backward[(triton.cdiv(P, FP8_BLOCK), H // 2 // FP8_BLOCK)](
        gate_up_PH.codes, gate_up_PH.scales, weights_P, gradient_PF, some_hidden.codes, some_hidden.scales,
        rows.codes, rows.scales, some_columns.codes, some_columns.scales, parts, P, H // 2, *_strides(gate_up_PH),
        *_strides(some_hidden), *_strides(rows), *_strides(some_columns), WITH_TRANSPOSED=with_transposed,
        BLOCK=FP8_BLOCK, IN_ASSEMBLY=in_assembly(), num_warps=_QUANTIZE_WARPS,
    )  # fmt: skip
    return hidden, rows, columns, parts.sum(dim=0)


def _empty(rows: int, columns: int, device: torch.device) -> BlockScaled:
    """Storage for codes with scales for 1 x 128 numbers. The scales of one block of columns are adjacent."""
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(triton.cdiv(columns, FP8_BLOCK), rows, dtype=torch.float32, device=device)
    return BlockScaled(codes, scales.T, (1, FP8_BLOCK))


def _strides(codes: BlockScaled) -> tuple[int, int]:
    """The strides of scales: of a row, and of a block."""
    return codes.scales.stride(0), codes.scales.stride(1)


@triton.jit
def _scale_of(largest):
    return tl.where(largest >= _LEAST, tl.div_rn(largest, _MOST), 1.0)


@triton.jit
def _codes_of(values, scale, IN_ASSEMBLY: tl.constexpr):
    """The float8_e4m3fn numbers nearest to values / scale, of equally near ones the even one.

    One instruction does it for two numbers. Triton's interpreter cuts digits off, so they are rounded before.
    """
    quotients = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
    if IN_ASSEMBLY:
        return quotients.to(tl.float8e4nv)
    else:
        bits = quotients.to(tl.int32, bitcast=True)
        power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power * 0.125, 2.0**-9) * (1.5 * 2.0**23)
        rounded = ((tl.abs(quotients) + shift) - shift).to(tl.int32, bitcast=True) | (bits & -0x80000000)
        return tl.where(quotients == quotients, rounded, 0x7FF00000).to(tl.float32, bitcast=True).to(tl.float8e4nv)


@triton.jit
def _store_rows(
    values, codes, scales, rows, is_row, columns, block, num_columns, row_stride, block_stride,
    IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Quantize a tile whose rows have a scale each, and store codes and scales."""
    scale = _scale_of(tl.max(tl.abs(values), axis=1))
    rows = rows.to(tl.int64)
    place = codes + rows[:, None] * num_columns + columns[None, :]
    tl.store(
        place, _codes_of(values, scale[:, None], IN_ASSEMBLY), mask=is_row[:, None] & (columns < num_columns)[None, :]
    )
    tl.store(scales + rows * row_stride + block * block_stride, scale, mask=is_row)


@triton.jit
def _quantize(
    x, places, codes, scales, columns_codes, columns_scales, P, C, row_stride, block_stride, column_stride,
    row_block_stride, HAS_PLACES: tl.constexpr, WITH_TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
    IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < P
    if HAS_PLACES:
        source = tl.load(places + rows, mask=is_row, other=-1)
        is_read = source >= 0
    else:
        source = rows.to(tl.int64)
        is_read = is_row
    values = tl.load(x + source[:, None] * C + columns[None, :], mask=is_read[:, None], other=0.0).to(tl.float32)
    _store_rows(values, codes, scales, rows, is_row, columns, block, C, row_stride, block_stride, IN_ASSEMBLY)
    if WITH_TRANSPOSED:
        _store_rows(
            tl.trans(values), columns_codes, columns_scales, columns, columns < C, rows, tl.program_id(0), P,
            column_stride, row_block_stride,
            IN_ASSEMBLY,
        )  # fmt: skip


@triton.jit
def _quantize_weight(
    weight, codes, scales, num_rows, C, all_rows, first, TRANSPOSE: tl.constexpr, BLOCK: tl.constexpr,
    IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2).to(tl.int64)
    own = tl.arange(0, BLOCK)
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    values = tl.load(weight + group * num_rows * C + (row + own).to(tl.int64)[:, None] * C + (column + own)[None, :])
    values = values.to(tl.float32)
    scale = _scale_of(tl.max(tl.max(tl.abs(values), axis=1), axis=0))
    row += first
    if TRANSPOSE:
        place = group * all_rows * C + (column + own).to(tl.int64)[:, None] * all_rows + (row + own)[None, :]
        tl.store(codes + place, _codes_of(tl.trans(values), scale, IN_ASSEMBLY))
        tl.store(scales + (group * (C // BLOCK) + column // BLOCK) * (all_rows // BLOCK) + row // BLOCK, scale)
    else:
        place = group * all_rows * C + (row + own).to(tl.int64)[:, None] * C + (column + own)[None, :]
        tl.store(codes + place, _codes_of(values, scale, IN_ASSEMBLY))
        tl.store(scales + (group * (all_rows // BLOCK) + row // BLOCK) * (C // BLOCK) + column // BLOCK, scale)


@triton.jit
def _multiply(
    x, x_scales, weight, weight_scales, ends, out, P, N, K, row_stride, block_stride, NUM_GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr, HAS_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own = tl.arange(0, BLOCK)
    first = tl.program_id(1) * BLOCK
    rows = (first + own).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + own
    group = tl.program_id(0).to(tl.int64) * 0
    if HAS_GROUPS:
        groups = tl.arange(0, GROUPS_PAD)
        group += tl.sum((tl.load(ends + groups, mask=groups < NUM_GROUPS, other=2147483647) <= first).to(tl.int32))
    if group < NUM_GROUPS:  # other rows belong to no group
        is_row = rows < P
        x_rows = x + rows[:, None] * K + own[None, :]
        weight_rows = weight + group * N * K + columns.to(tl.int64)[:, None] * K + own[None, :]
        scale_rows = x_scales + rows * row_stride
        scale_blocks = weight_scales + (group * (N // BLOCK) + tl.program_id(0)) * (K // BLOCK)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for block in range(0, K // BLOCK):
            left = tl.load(x_rows + block * BLOCK, mask=is_row[:, None], other=0.0)
            right = tl.load(weight_rows + block * BLOCK)
            product = tl.dot(left, tl.trans(right))
            scale = tl.load(scale_rows + block * block_stride, mask=is_row, other=0.0)
            total += product * (scale * tl.load(scale_blocks + block))[:, None]
        place = out + rows[:, None] * N + columns[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _weight_gradient(
    gradient, gradient_scales, x, x_scales, ends, out, P, num_outputs, num_inputs, gradient_stride,
    gradient_block_stride, x_stride, x_block_stride, HAS_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own = tl.arange(0, BLOCK)
    group = tl.program_id(2)
    outputs = (tl.program_id(1) * BLOCK + own).to(tl.int64)
    inputs = (tl.program_id(0) * BLOCK + own).to(tl.int64)
    start, stop = tl.program_id(2) * 0, P
    if HAS_GROUPS:
        start = tl.load(ends + group - 1, mask=group > 0, other=0)
        start, stop = tl.multiple_of(start, BLOCK), tl.load(ends + group)
    gradient_rows = gradient + outputs[:, None] * P + own[None, :]
    x_rows = x + inputs[:, None] * P + own[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for row in range(start, stop, BLOCK):
        is_row = (row + own < P)[None, :]
        left = tl.load(gradient_rows + row, mask=is_row, other=0.0)
        right = tl.load(x_rows + row, mask=is_row, other=0.0)
        product = tl.dot(left, tl.trans(right))
        scale = tl.load(gradient_scales + outputs * gradient_stride + row // BLOCK * gradient_block_stride)
        x_scale = tl.load(x_scales + inputs * x_stride + row // BLOCK * x_block_stride)
        total += product * scale[:, None] * x_scale[None, :]
    place = (group.to(tl.int64) * num_outputs + outputs[:, None]) * num_inputs + inputs[None, :]
    tl.store(out + place, total)


@triton.jit
def _gate(
    gate_up, weights, hidden_codes, hidden_scales, codes, scales, P, F, hidden_stride, hidden_block_stride, row_stride,
    block_stride, FOR_BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < P
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    place = gate_up + rows.to(tl.int64)[:, None] * (2 * F) + columns[None, :]
    gate = tl.load(place, mask=is_row[:, None], other=0.0).to(tl.float32)
    up = tl.load(place + F, mask=is_row[:, None], other=0.0).to(tl.float32)
    weight = tl.load(weights + rows, mask=is_row, other=0.0)
    hidden = gate / (1.0 + tl.exp(-gate)) * up * weight[:, None]
    _store_rows(
        hidden, hidden_codes, hidden_scales, rows, is_row, columns, block, F, hidden_stride, hidden_block_stride,
        IN_ASSEMBLY,
    )  # fmt: skip
    if FOR_BACKWARD:
        _store_rows(gate, codes, scales, rows, is_row, columns, block, 2 * F, row_stride, block_stride, IN_ASSEMBLY)
        _store_rows(
            up, codes, scales, rows, is_row, columns + F, block + F // BLOCK, 2 * F, row_stride, block_stride,
            IN_ASSEMBLY,
        )  # fmt: skip


@triton.jit
def _gate_backward(
    codes, scales, weights, gradient, hidden_codes, hidden_scales, row_codes, row_scales, column_codes,
    column_scales, parts, P, F,
    scale_stride, scale_block_stride, hidden_stride, hidden_block_stride, row_stride, row_block_stride,
    column_stride, column_block_stride, WITH_TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    own = tl.arange(0, BLOCK)
    tile, block = tl.program_id(0), tl.program_id(1)
    rows, columns = tile * BLOCK + own, block * BLOCK + own
    is_row = rows < P
    weight = tl.load(weights + rows, mask=is_row, other=0.0)[:, None]
    gate, up, wide = _gate_inputs(
        codes, scales, gradient, rows, is_row, columns, block, F, scale_stride, scale_block_stride, BLOCK
    )
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(parts + block.to(tl.int64) * P + rows, tl.sum(wide * hidden, axis=1), mask=is_row)
    if WITH_TRANSPOSED:
        _store_rows(
            tl.trans(hidden * weight), hidden_codes, hidden_scales, columns, columns < F, rows, tile, P,
            hidden_stride, hidden_block_stride, IN_ASSEMBLY,
        )  # fmt: skip
    gate, up, wide = _gate_inputs(
        codes, scales, gradient, rows, is_row, columns, block, F, scale_stride, scale_block_stride, BLOCK
    )
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    gate_gradient = wide * weight * up * (sigmoid + gate * sigmoid * (1.0 - sigmoid))
    _store_rows(
        gate_gradient, row_codes, row_scales, rows, is_row, columns, block, 2 * F, row_stride, row_block_stride,
        IN_ASSEMBLY,
    )  # fmt: skip
    if WITH_TRANSPOSED:
        _store_rows(
            tl.trans(gate_gradient), column_codes, column_scales, columns, columns < F, rows, tile, P, column_stride,
            column_block_stride, IN_ASSEMBLY,
        )  # fmt: skip
    gate, up, wide = _gate_inputs(
        codes, scales, gradient, rows, is_row, columns, block, F, scale_stride, scale_block_stride, BLOCK
    )
    up_gradient = wide * weight * (gate / (1.0 + tl.exp(-gate)))
    _store_rows(
        up_gradient, row_codes, row_scales, rows, is_row, columns + F, block + F // BLOCK, 2 * F, row_stride,
        row_block_stride, IN_ASSEMBLY,
    )  # fmt: skip
    if WITH_TRANSPOSED:
        _store_rows(
            tl.trans(up_gradient), column_codes, column_scales, columns + F, columns < F, rows, tile, P,
            column_stride, column_block_stride, IN_ASSEMBLY,
        )  # fmt: skip


@triton.jit
def _gate_inputs(
    codes, scales, gradient, rows, is_row, columns, block, F, scale_stride, scale_block_stride, BLOCK: tl.constexpr
):
    """Gate, up and the gradient of their product. Each result reads them again: all at once exceed the registers."""
    rows = rows.to(tl.int64)
    place = codes + rows[:, None] * (2 * F) + columns[None, :]
    scale_rows = scales + rows * scale_stride
    gate = tl.load(place, mask=is_row[:, None], other=0.0).to(tl.float32)
    gate *= tl.load(scale_rows + block * scale_block_stride, mask=is_row, other=0.0)[:, None]
    up = tl.load(place + F, mask=is_row[:, None], other=0.0).to(tl.float32)
    up *= tl.load(scale_rows + (block + F // BLOCK) * scale_block_stride, mask=is_row, other=0.0)[:, None]
    wide = tl.load(gradient + rows[:, None] * F + columns[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
    return gate, up, wide
