"""Products with block-scaled weights in Triton, for linear layers and experts.

Codes (float8_e4m3fn or int8) are read as pairs, 16 bits each, and converted to float16, which holds every code exactly;
float8 takes one instruction for two codes. The dims of a block are divided between two products. The weights are the
first operand of a product, of which a matrix unit takes 64 rows, and the few tokens are the second. A block of 128 dims
is multiplied so:

    tokens     divided by their largest magnitude in the block, so that they fit into float16
    product    codes x tokens, summed in float32
    total      += product * scale of the weights' block * magnitude of the tokens' block

O outputs, R rows of tokens, D input dims. All functions need an even D and tokens of 16 bits.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from openmimo.kernels.linear._triton_float8 import (
    first_dims,
    float8_halves,
    float8_quads,
    in_assembly,
    int8_quads,
)
from openmimo.kernels.weights import BlockScaled

MAX_WEIGHTS = 3
PAIRS = 64  # of a block of 128 dims; the blocks of scales are as large or span all dims
TILE = 64  # outputs of a program
_MIN_TILE_ROWS = 16
_TILES = {16: (64, 16, 4), 32: (128, 32, 8), 64: (64, 64, 4)}  # most rows: outputs, rows, warps of a program
_LARGE_TILE = (64, 64, 4)
_MAX_DIRECT_ROWS = 192  # above, it is faster to write the weights in the dtype of the tokens for torch's product
_DEQUANTIZED_ROWS = 16  # of a program
_PROGRAMS = 264  # that keep a device busy: two for each of 132 multiprocessors
_MIN_SPLIT_DIMS = 1024
_ADDED = 1024  # sums of a program
_STAGES = 4


def pairs_of(codes: torch.Tensor) -> torch.Tensor:
    """Return contiguous codes as pairs."""
    return codes.view(torch.int16)


def scale_pairs_of(weight: BlockScaled) -> int:
    """Return the pairs of a row that share a scale: a power of two, at least all if there is one scale."""
    return weight.block[1] // 2 if weight.scales.shape[-1] > 1 else triton.next_power_of_2(weight.shape[-1])


def codes_of(weight: BlockScaled) -> str:
    """Return how kernels convert the codes of a weight; see `code_halves`."""
    name = "int8" if weight.codes.dtype == torch.int8 else "float8"
    return f"{name} in quads" if in_assembly() else name


def prepare(x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [R, D] as products with codes take them.

    A kernel before the products does this once, and not each program of a product.

    Returns:
        float16 [2, R, blocks * PAIRS]: the numbers of both operands (`first_dims` and the others), divided by the
        largest magnitude of their block; zeros fill the last block. And these magnitudes, float32 [R, blocks].
    """
    R, D = x_RD.shape
    blocks = triton.cdiv(D, 2 * PAIRS)
    tokens = x_RD.new_empty(2, R, blocks * PAIRS, dtype=torch.float16)
    magnitudes = x_RD.new_empty(R, blocks, dtype=torch.float32)
    _prepare[(triton.cdiv(R, _MIN_TILE_ROWS), blocks)](
        x_RD, tokens, magnitudes, R, D, blocks, ROWS=_MIN_TILE_ROWS, PAIRS=PAIRS, IN_QUADS=in_assembly(),
    )  # fmt: skip
    return tokens, magnitudes


def _tile_of(num_rows: int) -> tuple[int, int, int]:
    """The outputs, rows and warps of a program."""
    return next((tile for most, tile in _TILES.items() if num_rows <= most), _LARGE_TILE)


def multiply(x_RD: torch.Tensor, weights: tuple[BlockScaled, ...]) -> torch.Tensor:
    """Return x [R, D] times one to three weights of one format, side by side: [R, sum of O], in the dtype of x."""
    x_RD = x_RD.contiguous()
    R, D = x_RD.shape
    if R > _MAX_DIRECT_ROWS:
        return F.linear(x_RD, _dequantized(weights, x_RD))
    tile, tile_rows, num_warps = _tile_of(R)
    sizes = [weight.shape[0] for weight in weights] + [0] * (MAX_WEIGHTS - len(weights))
    tiles = [triton.cdiv(size, tile) for size in sizes]
    splits = 1  # not by the number of rows
    programs = sum(triton.cdiv(size, TILE) for size in sizes)
    while programs * splits < _PROGRAMS and splits * _MIN_SPLIT_DIMS <= D // 2:
        splits *= 2
    num_outputs, blocks = sum(sizes), triton.cdiv(D, 2 * PAIRS)
    tokens, magnitudes = prepare(x_RD)
    out_RO = x_RD.new_empty(R, num_outputs)
    parts_SRO = out_RO if splits == 1 else x_RD.new_empty(splits, R, num_outputs, dtype=torch.float32)
    three = [*weights, *weights[-1:] * (MAX_WEIGHTS - len(weights))]
    _multiply[(sum(tiles), triton.cdiv(R, tile_rows), splits)](
        tokens, magnitudes, parts_SRO,
        *[pairs_of(weight.codes) for weight in three], *[weight.scales for weight in three], *sizes,
        *[weight.block[0] for weight in three], *[weight.scales.stride(0) for weight in three], R, num_outputs, D // 2,
        triton.cdiv(blocks, splits) * PAIRS, blocks,
        TILES0=tiles[0], TILES1=tiles[1], TILES2=tiles[2], TILE_ROWS=tile_rows, TILE=tile, PAIRS=PAIRS,
        SCALE_PAIRS=scale_pairs_of(weights[0]), CODES=codes_of(weights[0]),
        num_warps=num_warps, num_stages=_STAGES,
    )  # fmt: skip
    if splits > 1:
        _add_parts[(triton.cdiv(R * num_outputs, _ADDED),)](
            parts_SRO, out_RO, R * num_outputs, SPLITS=splits, BLOCK=_ADDED
        )
    return out_RO


def _dequantized(weights: tuple[BlockScaled, ...], like: torch.Tensor) -> torch.Tensor:
    """The values of the weights in the dtype of `like`, side by side: [sum of O, D]."""
    sizes = [weight.shape[0] for weight in weights]
    joined_OD = like.new_empty(sum(sizes), like.shape[1])
    for weight, out_OD in zip(weights, joined_OD.split(sizes), strict=True):
        rows, dims = weight.shape
        codes = "int8" if weight.codes.dtype == torch.int8 else "float8"
        _dequantize[(triton.cdiv(rows, _DEQUANTIZED_ROWS), triton.cdiv(dims, 2 * PAIRS))](
            pairs_of(weight.codes), weight.scales, out_OD, rows, dims // 2, weight.block[0], weight.scales.stride(0),
            ROWS=_DEQUANTIZED_ROWS, PAIRS=PAIRS, SCALE_PAIRS=scale_pairs_of(weight), CODES=codes,
        )  # fmt: skip
    return joined_OD


@triton.jit
def prepared_block(tokens, magnitudes, rows, is_row, start, num_rows, num_blocks, PAIRS: tl.constexpr):
    """A block of prepared tokens: float16 [rows, pairs] for the two operands, and the magnitudes of the rows."""
    rows = rows.to(tl.int64)
    first = tokens + (rows * num_blocks * PAIRS)[:, None] + (start + tl.arange(0, PAIRS))[None, :]
    second = first + tl.cast(num_rows, tl.int64) * num_blocks * PAIRS
    even = tl.load(first, mask=is_row[:, None], other=0.0)
    odd = tl.load(second, mask=is_row[:, None], other=0.0)
    return even, odd, tl.load(magnitudes + rows * num_blocks + start // PAIRS, mask=is_row, other=0.0)


@triton.jit
def code_halves(pairs, CODES: tl.constexpr):
    """The float16 values of the codes in int16 pairs, for the two operands of `prepare`."""
    if CODES == "float8 in quads":
        return float8_quads(pairs)
    elif CODES == "int8 in quads":
        return int8_quads(pairs)
    elif CODES == "int8":  # the bits of 1024 + 128 + code
        low, high = pairs.to(tl.uint8), (pairs >> 8).to(tl.uint8)
        even = ((low ^ 0x80).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
        odd = ((high ^ 0x80).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
        return even, odd
    else:
        return float8_halves(pairs, IN_ASSEMBLY=False)


@triton.jit
def add_block(
    total, codes, scales, is_output, even, odd, magnitude, start, num_pairs,
    PAIRS: tl.constexpr, SCALE_PAIRS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Add the product of one block to `total`, [outputs, rows].

    Args:
        total: The sum so far, float32.
        codes: Pointers to the pairs of each output.
        scales: Pointers to the scales of each output.
        is_output: Whether an output exists.
        even: As returned by `prepared_block`, with `odd` and `magnitude`.
        odd: See there.
        magnitude: See there.
        start: First pair of the block.
        num_pairs: D // 2.
        PAIRS: Pairs of a block.
        SCALE_PAIRS: Pairs that share a scale.
        CODES: As in `code_halves`.
    """
    places = start + tl.arange(0, PAIRS)
    pairs = tl.load(codes[:, None] + places[None, :], mask=is_output[:, None] & (places < num_pairs)[None, :], other=0)
    scale = tl.load(scales + start // SCALE_PAIRS, mask=is_output, other=0.0)
    even_codes, odd_codes = code_halves(pairs, CODES)
    product = tl.dot(even_codes, tl.trans(even))
    product = tl.dot(odd_codes, tl.trans(odd), product)
    return total + product * scale[:, None] * magnitude[None, :]


@triton.jit
def _prepare(
    x, tokens, magnitudes, num_rows, num_dims, num_blocks, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    IN_QUADS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = rows < num_rows
    block = tl.program_id(1)
    pairs = block * PAIRS + tl.arange(0, PAIRS)
    dims = first_dims(pairs, IN_QUADS)
    others = dims + (2 if IN_QUADS else 1)
    x_rows = x + (rows * num_dims)[:, None]
    first = tl.load(x_rows + dims[None, :], mask=is_row[:, None] & (dims < num_dims)[None, :], other=0.0)
    second = tl.load(x_rows + others[None, :], mask=is_row[:, None] & (others < num_dims)[None, :], other=0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    magnitude = tl.maximum(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1), 1e-30)
    inverse = (1.0 / magnitude)[:, None]
    place = tokens + (rows * num_blocks * PAIRS)[:, None] + pairs[None, :]
    tl.store(place, (first * inverse).to(tl.float16), mask=is_row[:, None])
    place += tl.cast(num_rows, tl.int64) * num_blocks * PAIRS
    tl.store(place, (second * inverse).to(tl.float16), mask=is_row[:, None])
    tl.store(magnitudes + rows * num_blocks + block, magnitude, mask=is_row)


@triton.jit
def _dequantize(
    codes, scales, out, num_rows, num_pairs, block_rows, stride, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    SCALE_PAIRS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    first = rows.to(tl.int64) * num_pairs
    mask = (rows < num_rows)[:, None] & (places < num_pairs)[None, :]
    even, odd = code_halves(tl.load(codes + first[:, None] + places[None, :], mask=mask, other=0), CODES)
    scale_places = (rows // block_rows * stride)[:, None] + (places // SCALE_PAIRS)[None, :]
    scale = tl.load(scales + scale_places, mask=mask, other=0.0)
    values = tl.join(even.to(tl.float32) * scale, odd.to(tl.float32) * scale)
    columns = 2 * PAIRS * tl.program_id(1) + tl.arange(0, 2 * PAIRS)
    is_there = (rows < num_rows)[:, None] & (columns < 2 * num_pairs)[None, :]
    values = tl.reshape(values, (ROWS, 2 * PAIRS)).to(out.dtype.element_ty)
    tl.store(out + 2 * first[:, None] + columns[None, :], values, mask=is_there)


@triton.jit
def _multiply(
    x, magnitudes, out, codes0, codes1, codes2, scales0, scales1, scales2, size0, size1, size2, block0, block1, block2,
    stride0, stride1, stride2, num_rows, num_outputs, num_pairs, split_pairs, num_blocks,
    TILES0: tl.constexpr, TILES1: tl.constexpr, TILES2: tl.constexpr, TILE_ROWS: tl.constexpr, TILE: tl.constexpr,
    PAIRS: tl.constexpr, SCALE_PAIRS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < TILES0:
        _multiply_tile(
            x, magnitudes, out, codes0, scales0, tile, size0, block0, stride0, size0 * 0, num_rows, num_outputs,
            num_pairs, split_pairs, num_blocks, TILE_ROWS, TILE, PAIRS, SCALE_PAIRS, CODES,
        )  # fmt: skip
    if TILES1 > 0:  # noqa: SIM102  (known when the kernel is compiled)
        if (tile >= TILES0) & (tile < TILES0 + TILES1):
            _multiply_tile(
                x, magnitudes, out, codes1, scales1, tile - TILES0, size1, block1, stride1, size0, num_rows,
                num_outputs, num_pairs, split_pairs, num_blocks, TILE_ROWS, TILE, PAIRS, SCALE_PAIRS, CODES,
            )  # fmt: skip
    if TILES2 > 0:  # noqa: SIM102
        if tile >= TILES0 + TILES1:
            _multiply_tile(
                x, magnitudes, out, codes2, scales2, tile - TILES0 - TILES1, size2, block2, stride2, size0 + size1,
                num_rows, num_outputs, num_pairs, split_pairs, num_blocks, TILE_ROWS, TILE, PAIRS, SCALE_PAIRS, CODES,
            )  # fmt: skip


@triton.jit
def _multiply_tile(
    x, magnitudes, out, codes, scales, tile, size, block, stride, before, num_rows, num_outputs, num_pairs,
    split_pairs, num_blocks, TILE_ROWS: tl.constexpr, TILE: tl.constexpr, PAIRS: tl.constexpr,
    SCALE_PAIRS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_row = rows < num_rows
    outputs = tile * TILE + tl.arange(0, TILE)
    is_output = outputs < size
    code_rows = codes + outputs.to(tl.int64) * num_pairs
    scale_rows = scales + outputs // block * stride
    total = tl.zeros((TILE, TILE_ROWS), tl.float32)
    first = tl.program_id(2) * split_pairs
    for start in range(first, tl.minimum(first + split_pairs, num_pairs), PAIRS):
        even, odd, magnitude = prepared_block(x, magnitudes, rows, is_row, start, num_rows, num_blocks, PAIRS)
        total = add_block(
            total, code_rows, scale_rows, is_output, even, odd, magnitude, start, num_pairs, PAIRS, SCALE_PAIRS, CODES
        )
    place = (split * num_rows + rows)[:, None] * num_outputs + (before + outputs)[None, :]
    tl.store(out + place, tl.trans(total), mask=is_row[:, None] & is_output[None, :])


@triton.jit
def _add_parts(parts, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_number = numbers < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * count + numbers, mask=is_number, other=0.0)
    tl.store(out + numbers, total, mask=is_number)
