"""Products with packed weights in Triton (formats: kernels/weights.py). Not yet run on a GPU.

Inputs are int8 with a scale, as the formats define them. A sum over signs is a sum over bits, which are numbers of the
matrix unit as they are:

    sum of (1 - 2 bit) x  =  sum of x  -  2 sum of bit x

Two products with bits give the sums of a stage of two planes, `first` (axis, or "not zero") and `sign`:

    signs, turned             sums of x over the bits of sign, and of sign xor first
    real values               sum of x - signs - turned
    imaginary or not zero     turned - signs

All these are exact in int32. Scales multiply the finished sums of a stage in float32.

A program multiplies a tile of outputs by a tile of columns, which are the rows of inputs, or in fairy2i their halves
(column 2 r + h). It goes through all stages and parts, or through an equal part of these steps (split), so few rows
occupy the whole device. Bit j of the bytes of a block is one operand, and the inputs of the columns 8 b + j are the
other; `_prepare` puts them in this order, so no bit moves to another thread.

R rows of inputs, D input dim, O outputs.
"""

import torch
import triton
import triton.language as tl

from openmimo.kernels.linear._triton import _add_parts as add_parts
from openmimo.kernels.linear._triton_float8 import in_assembly
from openmimo.kernels.weights import Packed

TILE = 64  # outputs of a program, or complex outputs, for few columns
BYTES = 64  # of a row of a plane in a step: 512 columns
_TILES = {16: (TILE, 4), 32: (TILE, 4), 64: (2 * TILE, 8)}  # columns of a program: outputs, warps
_MIN_COLUMNS, _MAX_COLUMNS = min(_TILES), max(_TILES)
_PROGRAMS = 256  # that keep a device busy: about two for each multiprocessor
_STAGES = 3
_ADDED = 1024  # sums of a program


def multiply(x_RD: torch.Tensor, weights: list[Packed]) -> torch.Tensor:
    """Return x [R, D] times weights of one format, side by side: [R, sum of O], in the dtype of x."""
    inputs = prepare(x_RD.contiguous(), weights[0].packing.input_halves)
    out_RO = x_RD.new_empty(len(x_RD), sum([weight.shape[0] for weight in weights]))
    start = 0
    for weight in weights:
        if weight.shape[0]:
            _multiply_one(inputs, weight, out_RO, start)
        start += weight.shape[0]
    return out_RO


def prepare(x_RD: torch.Tensor, halves: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round inputs to int8 and sort them by the bit that multiplies them.

    Returns:
        int8 [C, blocks, 8, BYTES] for C = R * halves columns: element [c, k, j, b] is number 8 (k * BYTES + b) + j of
        column c, or zero behind the last. The sums of the blocks, int32 [C, blocks]. The scales of the columns,
        float32 [C].
    """
    R, D = x_RD.shape
    columns, dims = R * halves, triton.cdiv(D, halves)
    blocks = triton.cdiv(dims, 8 * BYTES)
    numbers = x_RD.new_empty(columns, blocks, 8, BYTES, dtype=torch.int8)
    sums = x_RD.new_empty(columns, blocks, dtype=torch.int32)
    scales = x_RD.new_empty(columns, dtype=torch.float32)
    _prepare[(columns, blocks)](x_RD, numbers, sums, scales, D, dims, HALVES=halves, BYTES=BYTES)
    return numbers, sums, scales


def _multiply_one(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], weight: Packed, out_RO: torch.Tensor, start: int
) -> None:
    """Write the product with one weight, of one or more matrices, to the columns of `out_RO` from `start` on."""
    packing, (outputs, _) = weight.packing, weight.matrix_shape
    stages, parts, part_rows, planes, num_bytes = weight.codes.shape[-5:]
    halves, blocks, (R, num_outputs) = packing.input_halves, inputs[1].shape[1], out_RO.shape
    steps, splits = stages * parts * blocks, 1  # not by the number of rows
    while triton.cdiv(part_rows, TILE) * len(weight.codes) * splits < _PROGRAMS and 2 * splits <= steps:
        splits *= 2
    columns = min(_MAX_COLUMNS, max(_MIN_COLUMNS, triton.next_power_of_2(R * halves)))
    tile, num_warps = _TILES[columns]
    tiles, width = triton.cdiv(part_rows, tile), weight.shape[0]
    target = out_RO if splits == 1 else out_RO.new_empty(splits, R, width, dtype=torch.float32)
    _multiply[(tiles * len(weight.codes), triton.cdiv(R * halves, columns), splits)](
        *inputs, weight.codes.view(torch.int8), weight.scales, target,
        R, num_outputs if splits == 1 else width, start if splits == 1 else 0, outputs, part_rows, num_bytes, blocks,
        steps, triton.cdiv(steps, splits), tiles,
        FORMAT=packing.format, PARTS=parts, PLANES=planes, AXES=packing.axes, HALVES=halves, PER_ROW=packing.per_row,
        PARTS_OF_MATRIX=stages * parts, TILE=tile, COLUMNS=columns, BYTES=BYTES, IN_ASSEMBLY=in_assembly(),
        num_warps=num_warps, num_stages=_STAGES,
    )  # fmt: skip
    if splits > 1:
        out = out_RO if width == num_outputs else out_RO.new_empty(R, width)
        add_parts[(triton.cdiv(R * width, _ADDED),)](target, out, R * width, SPLITS=splits, BLOCK=_ADDED)
        if width != num_outputs:
            out_RO[:, start : start + width] = out


@triton.jit
def _prepare(x, numbers, sums, scales, num_dims, half_dims, HALVES: tl.constexpr, BYTES: tl.constexpr):
    column, block = tl.program_id(0), tl.program_id(1)
    num_blocks = tl.num_programs(1)
    begin = column % HALVES * half_dims
    end = tl.minimum(begin + half_dims, num_dims)
    x_row = x + (column // HALVES).to(tl.int64) * num_dims
    places = tl.arange(0, 8 * BYTES)
    largest = tl.zeros((8 * BYTES,), tl.float32)
    broken = tl.zeros((8 * BYTES,), tl.float32)  # NaN where a number is not finite
    for start in range(begin, end, 8 * BYTES):
        values = tl.load(x_row + start + places, mask=start + places < end, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
        broken += values - values
    scale = tl.div_rn(tl.max(largest, axis=0), 127.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    dims = begin + block * 8 * BYTES + places
    values = tl.load(x_row + dims, mask=dims < end, other=0.0).to(tl.float32)
    levels = tl.div_rn(values, tl.zeros_like(values) + scale)
    levels = tl.where(tl.abs(levels) <= 127.5, levels, 0.0)  # NaN as well
    levels = (levels + 12582912.0) - 12582912.0  # to the nearest integer, ties to even: 1.5 * 2^23
    place = numbers + (column.to(tl.int64) * num_blocks + block) * 8 * BYTES + places % 8 * BYTES + places // 8
    tl.store(place, levels.to(tl.int8))
    tl.store(sums + column * num_blocks + block, tl.sum(levels.to(tl.int32), axis=0))
    if block == 0:
        tl.store(scales + column, scale + tl.sum(broken, axis=0))


@triton.jit
def _lowest_bits(codes, IN_ASSEMBLY: tl.constexpr):
    """Bit 0 of each byte, as int8; in assembly, four bytes at a time."""
    if IN_ASSEMBLY:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x01010101;", "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return codes & 1


@triton.jit
def _next_bits(codes, IN_ASSEMBLY: tl.constexpr):
    """Each byte, moved by one bit. The bits that move in from another byte never become bit 0 in seven calls."""
    if IN_ASSEMBLY:
        return tl.inline_asm_elementwise("shr.u32 $0, $1, 1;", "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return codes >> 1


@triton.jit
def _add_block(
    signs, turned, code_rows, is_output, number_rows, is_column, block, num_bytes,
    PLANES: tl.constexpr, BYTES: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Add the sums over the bits of one block to `signs` and `turned`, [outputs, columns]."""
    bytes_of_block = tl.arange(0, BYTES)
    places = block * BYTES + bytes_of_block
    is_code = is_output[:, None] & (places < num_bytes)[None, :]
    place = code_rows[:, None] + places[None, :]
    sign_bits = tl.load(place + (PLANES - 1) * num_bytes, mask=is_code, other=0)
    turned_bits = sign_bits
    if PLANES == 2:
        turned_bits = sign_bits ^ tl.load(place, mask=is_code, other=0)
    number_rows += block * (8 * BYTES)
    for bit in tl.static_range(8):
        x = tl.load(number_rows[:, None] + (bit * BYTES + bytes_of_block)[None, :], mask=is_column[:, None], other=0)
        x = tl.trans(x)
        signs = tl.dot(_lowest_bits(sign_bits, IN_ASSEMBLY), x, signs, out_dtype=tl.int32)
        sign_bits = _next_bits(sign_bits, IN_ASSEMBLY)
        if PLANES == 2:
            turned = tl.dot(_lowest_bits(turned_bits, IN_ASSEMBLY), x, turned, out_dtype=tl.int32)
            turned_bits = _next_bits(turned_bits, IN_ASSEMBLY)
    return signs, turned


@triton.jit
def _add_stage(
    real, imaginary, signs, turned, total, column_scale, scales, is_output, direction,
    FORMAT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the scaled sums of one part of a stage to the outputs, float32 [outputs, rows].

    Args:
        real: Outputs, or real parts of outputs.
        imaginary: Imaginary parts of outputs; unchanged in real formats.
        signs: Sums over the bits of the sign, [outputs, columns].
        turned: Sums over the bits of sign xor first.
        total: Sums of the columns.
        column_scale: Scales of the columns.
        scales: Pointers to the (first) scale of each output.
        is_output: Whether an output exists.
        direction: 1 for U and -1 for W of fairy2i: the sign of the imaginary part of the input.
        FORMAT: Name of the format.
        TILE: Number of outputs.
        ROWS: Number of rows.
    """
    scale = tl.load(scales, mask=is_output, other=0.0)[:, None]
    if FORMAT == "binary":
        real += scale * ((total[None, :] - 2 * signs).to(tl.float32) * column_scale[None, :])
    elif FORMAT == "ternary":
        real += scale * ((turned - signs).to(tl.float32) * column_scale[None, :])
    else:
        scale_im = tl.load(scales + 1, mask=is_output, other=0.0)[:, None]
        re = (total[None, :] - signs - turned).to(tl.float32) * column_scale[None, :]
        im = (turned - signs).to(tl.float32) * column_scale[None, :]
        if FORMAT == "fairy":
            real += scale * re
            imaginary += scale_im * im
        else:
            re_of_re, re_of_im = tl.split(tl.reshape(re, (TILE, ROWS, 2)))
            im_of_re, im_of_im = tl.split(tl.reshape(im, (TILE, ROWS, 2)))
            real += scale * re_of_re - direction * scale_im * im_of_im
            imaginary += scale_im * im_of_re + direction * scale * re_of_im
    return real, imaginary


@triton.jit
def _multiply(
    numbers, sums, column_scales, codes, scales, out,
    num_rows, out_stride, before, num_outputs, part_rows, num_bytes, num_blocks, num_steps, split_steps, tiles,
    FORMAT: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr, AXES: tl.constexpr, HALVES: tl.constexpr,
    PER_ROW: tl.constexpr, PARTS_OF_MATRIX: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    BYTES: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = COLUMNS // HALVES
    matrix, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    outputs = tile * TILE + tl.arange(0, TILE)
    is_output = outputs < part_rows
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_rows * HALVES
    column_scale = tl.load(column_scales + columns, mask=is_column, other=0.0)
    number_rows = numbers + columns.to(tl.int64) * num_blocks * (8 * BYTES)
    real = tl.zeros((TILE, ROWS), tl.float32)
    imaginary = tl.zeros((TILE, ROWS), tl.float32)
    signs = tl.zeros((TILE, COLUMNS), tl.int32)
    turned = tl.zeros((TILE, COLUMNS), tl.int32)
    total = tl.zeros((COLUMNS,), tl.int32)
    first = tl.program_id(2) * split_steps
    last = tl.minimum(first + split_steps, num_steps)
    for step in range(first, last):
        part = step // num_blocks
        block = step - part * num_blocks
        part_of_all = matrix.to(tl.int64) * PARTS_OF_MATRIX + part
        code_rows = codes + (part_of_all * part_rows + outputs) * (PLANES * num_bytes)
        signs, turned = _add_block(
            signs, turned, code_rows, is_output, number_rows, is_column, block, num_bytes, PLANES, BYTES, IN_ASSEMBLY
        )
        total += tl.load(sums + columns * num_blocks + block, mask=is_column, other=0)
        if (block == num_blocks - 1) | (step == last - 1):
            scale_rows = part_of_all * part_rows + outputs if PER_ROW else part_of_all + outputs * 0
            real, imaginary = _add_stage(
                real, imaginary, signs, turned, total, column_scale, scales + scale_rows * AXES, is_output,
                1.0 - 2.0 * (part % PARTS), FORMAT, TILE, ROWS,
            )  # fmt: skip
            signs = tl.zeros((TILE, COLUMNS), tl.int32)
            turned = tl.zeros((TILE, COLUMNS), tl.int32)
            total = tl.zeros((COLUMNS,), tl.int32)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    out_rows = out + (tl.program_id(2).to(tl.int64) * num_rows + rows) * out_stride + before + matrix * num_outputs
    mask = (rows < num_rows)[None, :] & (is_output & (outputs < num_outputs))[:, None]
    tl.store(out_rows[None, :] + outputs[:, None], real, mask=mask)
    if AXES == 2:
        mask = (rows < num_rows)[None, :] & (is_output & (part_rows + outputs < num_outputs))[:, None]
        tl.store(out_rows[None, :] + (part_rows + outputs)[:, None], imaginary, mask=mask)
