"""Triton kernels of paged attention.

A program computes the rows (queries of a sequence times query heads of a group) of one key/value head against one part
of the keys. The parts of a sequence begin at fixed positions, so that the bits of a row depend neither on the batch
nor on the length of the text. Later parts have more keys: a short text is spread over many programs, and a long one has
few partial results. A second kernel combines the parts of a row; a layer with a short window has one part, which begins
at a multiple of the block:

    keys of a sequence     0 .. 255 | ... | 1792 .. 2047 | 2048 .. 2559 | ... | 4096 .. 5119 | ... | 8192 .. 10239 | ...
    part                       0    | ... |      7       |      8       | ... |      12      | ... |      16       | ...
    result of a program    (max, sum, weighted values) of each row
    combine                one row of one head: rescales the parts in order, adds the sink

The keys of a page are read once for all rows of the group. A matrix unit of Hopper takes 64 rows of its first operand.
These are keys (and dims of values) while there are fewer rows than 64. Key dims are read as two powers of two
(192 = 128 + 64). Exponents are of base 2.

A cache in float8_e4m3fn is read as pairs of numbers, 16 bits each. Two halves of the numbers are converted to
float16, which holds every value of the format and takes one instruction for two numbers. (bfloat16 takes another one
for each number, of a unit that is slower than the memory.) Queries are divided by their largest magnitude for float16,
and the logits are multiplied by it:

    keys, 16 bits     (k0 k1) (k2 k3) ...  ->  first k0 k1 k4 k5 ...   second k2 k3 k6 k7 ...
    logits            q_first x first  +  q_second x second
    values            two sums, of the even and of the odd dims, which are joined at the end
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from openmimo.kernels.attention import Pages
from openmimo.kernels.linear._triton_float8 import first_dims, float8_halves, float8_quads, in_assembly

_MAX_ROWS = 64
_WIDE_ROWS = 64  # rows of the first operand of a matrix unit
_MIN_TILE = 16  # of a matrix product
_MAX_WINDOW_OF_A_PART = 512
_PARTS_AHEAD = 32
LOG2_E = 1.4426950408889634
_BLOCK_KEYS = 64
_LARGEST_PART = 2048
_STAGES = 3
_ALIGNED = 16  # multiples of it are known to the compiler, which then gives neighbors of a row to one thread
_FEW_PROGRAMS, _STAGES_OF_FEW = 8, 5  # sequences times key/value heads that leave most of a device idle


def count_parts(num_keys: int) -> int:
    """The number of parts that cover `num_keys` keys; see `_part`."""
    first, count, size = 0, 0, 256
    for last in (2048, 4096, 8192):
        if size == _LARGEST_PART or num_keys <= last:
            break
        first, count, size = last, count + (last - first) // size, 2 * size
    return count + triton.cdiv(num_keys - first, size)


def attend_pages(
    q_TNK: torch.Tensor,
    pages: Pages,
    sink_N: torch.Tensor | None,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    *,
    longest_query: int,
    longest_key: int,
    window_keys: int | None,
) -> torch.Tensor:
    """Attention output [T, N, V]; arguments as in `openmimo.kernels.attention.paged_attend`.

    Rows of queries beyond the sum of `query_lengths_B` are not written. A sequence may have no queries and no keys.
    """
    T, N, _ = q_TNK.shape
    B, G, V = pages.tables_BY.shape[0], pages.keys_XPGK.shape[2], pages.values_XPGV.shape[3]
    out_TNV = q_TNK.new_empty(T, N, V)
    is_combined = not is_one_part(window_keys)  # not by the longest key: the bits would depend on the batch
    num_parts = count_parts(longest_key) if is_combined else 1
    tile = tile_of(q_TNK.dtype, pages, N, longest_query)
    partial = maxima = sums = out_TNV
    if is_combined:
        shape = (B, G, num_parts, tile.num_rows)
        partial = q_TNK.new_empty(*shape, V, dtype=torch.float32)
        maxima, sums = (q_TNK.new_empty(shape, dtype=torch.float32) for _ in range(2))
    both = dict(
        num_heads=N, num_groups=G, num_parts=num_parts, HEADS=N // G, TILE_ROWS=tile.rows, ROW_TILES=tile.num_tiles,
        HAS_SINK=sink_N is not None, HAS_WINDOW=window_keys is not None, SEQUENCES=triton.next_power_of_2(B),
        LARGEST_PART=_LARGEST_PART,
    )  # fmt: skip
    _attend_part[(G * tile.num_tiles, B, num_parts)](
        q_TNK, tile.keys, tile.values, pages.tables_BY, query_lengths_B, key_lengths_B, sink_N, out_TNV,
        partial, maxima, sums, q_TNK.shape[2] ** -0.5 * LOG2_E, window_keys or 0,
        q_TNK.stride(0), q_TNK.stride(1), *tile.strides, pages.tables_BY.stride(0),
        IS_COMBINED=is_combined, **both, **tile.constants,
    )  # fmt: skip
    if is_combined:
        _combine_parts[(tile.num_rows, G, B)](
            partial, maxima, sums, query_lengths_B, key_lengths_B, sink_N, out_TNV, window_keys or 0,
            PARTS_PAD=triton.next_power_of_2(num_parts), AHEAD=min(_PARTS_AHEAD, triton.next_power_of_2(num_parts)),
            VALUE_DIM=V, VALUE_PAD=triton.next_power_of_2(V), num_warps=1, **both,
        )  # fmt: skip
    return out_TNV


def is_one_part(window_keys: int | None) -> bool:
    """Return whether one program reads all keys in the window."""
    return window_keys is not None and window_keys <= _MAX_WINDOW_OF_A_PART


class Tile(NamedTuple):
    """The division of a call into programs.

    Attributes:
        rows: Rows of a program.
        num_tiles: Tiles of a sequence and key/value head.
        keys: The cached keys, maybe as pairs.
        values: The cached values, likewise.
        strides: Their strides of pages, positions and heads.
        constants: Constants of the kernels that walk over keys.
    """

    rows: int
    num_tiles: int
    keys: torch.Tensor
    values: torch.Tensor
    strides: tuple[int, ...]
    constants: dict[str, Any]

    @property
    def num_rows(self) -> int:
        """Rows of all tiles of a sequence and key/value head."""
        return self.rows * self.num_tiles


def tile_of(dtype: torch.dtype, pages: Pages, num_heads: int, longest_query: int) -> Tile:
    """Return the tile for queries of this dtype."""
    keys, values = pages.keys_XPGK, pages.values_XPGV
    P, G = keys.shape[1:3]
    rows = triton.next_power_of_2(longest_query) * (num_heads // G)
    tile_rows = max(_MIN_TILE, min(_MAX_ROWS, triton.next_power_of_2(rows)))
    is_paired, is_few = _is_paired(dtype, pages), pages.tables_BY.shape[0] * G <= _FEW_PROGRAMS
    if is_paired:
        keys, values = keys.view(torch.int16), values.view(torch.int16)
    K, V = keys.shape[3], values.shape[3]
    first_dims = 1 << (K.bit_length() - 1)
    constants = dict(
        KEY_DIM=K, FIRST_DIMS=max(_MIN_TILE, first_dims), REST_DIMS=K - first_dims,
        REST_PAD=max(_MIN_TILE, triton.next_power_of_2(max(K - first_dims, 1))),
        VALUE_DIM=V, VALUE_PAD=max(_MIN_TILE, triton.next_power_of_2(V)),
        PAGE=P, PAGES=max(1, _BLOCK_KEYS // P) if P & (P - 1) == 0 else 0, BLOCK=_BLOCK_KEYS, IS_PAIRED=is_paired,
        KEY_AXIS=0 if tile_rows < _WIDE_ROWS else 1, IN_ASSEMBLY=in_assembly(),
        IN_QUADS=in_assembly() and all(stride % _ALIGNED == 0 for stride in keys.stride()[:3]),
        PRECISION="ieee" if dtype == torch.float32 else "tf32", num_warps=4,
        num_stages=_STAGES_OF_FEW if is_few and not is_paired else _STAGES,
        maxnreg=_registers(is_paired, tile_rows),
    )  # fmt: skip
    strides = (*keys.stride()[:3], *values.stride()[:3])
    return Tile(tile_rows, triton.cdiv(rows, tile_rows), keys, values, strides, constants)


def _registers(is_paired: bool, tile_rows: int) -> int | None:
    """The most registers of a thread, so that four programs run on a multiprocessor, or three; None for no limit.

    Without pairs, the number of programs is bounded by the memory of their blocks.
    """
    if not is_paired:
        return None
    return 128 if tile_rows < _WIDE_ROWS else 168


def _is_paired(dtype: torch.dtype, pages: Pages) -> bool:
    """Whether the cache is read as pairs of float8 numbers."""
    keys, values = pages.keys_XPGK, pages.values_XPGV
    places = (keys.shape[3], values.shape[3], *keys.stride()[:3], *values.stride()[:3], keys.storage_offset())
    is_even = all(number % 2 == 0 for number in (*places, values.storage_offset()))
    return is_even and keys.dtype == torch.float8_e4m3fn and dtype in (torch.bfloat16, torch.float16)


@triton.jit
def _part(part, LARGEST: tl.constexpr):
    """The first key of a part and the number of its keys."""
    first = part * 256
    size = first * 0 + 256
    if LARGEST > 256:
        first = tl.where(part >= 8, 2048 + (part - 8) * 512, first)
        size = tl.where(part >= 8, 512, size)
    if LARGEST > 512:
        first = tl.where(part >= 12, 4096 + (part - 12) * 1024, first)
        size = tl.where(part >= 12, 1024, size)
    if LARGEST > 1024:
        first = tl.where(part >= 16, 8192 + (part - 16) * 2048, first)
        size = tl.where(part >= 16, 2048, size)
    return first, size


@triton.jit
def span(query_lengths, key_lengths, b, SEQUENCES: tl.constexpr):
    """The first query row of sequence b, and its numbers of queries and keys."""
    earlier = tl.arange(0, SEQUENCES)
    first_query = tl.sum(tl.load(query_lengths + earlier, mask=earlier < b, other=0))
    return first_query, tl.load(query_lengths + b), tl.load(key_lengths + b)


@triton.jit
def _load_rows(rows, is_row, dims, num_dims):
    """A tile [rows, dims] from the addresses of rows; 0 outside."""
    return tl.load(rows + dims[None, :], mask=is_row[:, None] & (dims < num_dims)[None, :], other=0.0)


@triton.jit
def _offsets_of(
    table, block, position, is_key, stop, stride_kx, stride_vx, PAGE: tl.constexpr, PAGES: tl.constexpr
):  # fmt: skip
    """The offsets of the pages of a block's keys and values. If blocks begin with pages, these are read as scalars."""
    if PAGES == 0:
        page = tl.load(table + position // PAGE, mask=is_key, other=0).to(tl.int64)
        return page * stride_kx, page * stride_vx
    else:
        first = block // PAGE
        page = tl.load(table + first).to(tl.int64)
        zero = position.to(tl.int64) * 0
        key_offset, value_offset = zero + page * stride_kx, zero + page * stride_vx
        for number in tl.static_range(1, PAGES):
            page = tl.load(table + first + number, mask=block + number * PAGE < stop, other=0).to(tl.int64)
            is_there = position >= block + number * PAGE
            key_offset = tl.where(is_there, page * stride_kx, key_offset)
            value_offset = tl.where(is_there, page * stride_vx, value_offset)
        return key_offset, value_offset


@triton.jit
def _logits(q, k, total, KEY_AXIS: tl.constexpr, PRECISION: tl.constexpr):
    """Products of queries and keys added to `total`: [keys, rows] if the key axis is 0, else [rows, keys]."""
    if KEY_AXIS == 0:
        return tl.dot(k, tl.trans(q), total, input_precision=PRECISION)
    else:
        return tl.dot(q, tl.trans(k), total, input_precision=PRECISION)


@triton.jit
def _weighted(probabilities, v, total, KEY_AXIS: tl.constexpr, PRECISION: tl.constexpr):
    """Values by probability added to `total`: [dims, rows] if the key axis is 0, else [rows, dims]."""
    probabilities = probabilities.to(v.dtype)
    if KEY_AXIS == 0:
        return tl.dot(tl.trans(v), probabilities, total, input_precision=PRECISION)
    else:
        return tl.dot(probabilities, v, total, input_precision=PRECISION)


@triton.jit
def rotated(
    rows, cos_rows, sin_rows, is_row, dims, NUM_DIMS: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """A tile [rows, dims] whose first 2 * HALF dims are rotated as in `openmimo.kernels.rotary`."""
    numbers = _load_rows(rows, is_row, dims, NUM_DIMS)
    if HALF > 0:
        is_turned = is_row[:, None] & (dims < 2 * HALF)[None, :]
        partners = tl.where(dims < HALF, dims + HALF, dims - HALF)
        partner = tl.load(rows + partners[None, :], mask=is_turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_rows + dims[None, :], mask=is_turned, other=0.0).to(tl.float32)
        sin = tl.load(sin_rows + dims[None, :], mask=is_turned, other=0.0).to(tl.float32)
        first = (numbers.to(tl.float32) * cos).to(dtype).to(tl.float32)  # rounded, as in the reference
        turned = first + tl.where(dims < HALF, -1.0, 1.0)[None, :] * partner * sin
        numbers = tl.where(is_turned, turned.to(dtype), numbers)
    return numbers


@triton.jit
def _load_queries(
    q_rows, cos_rows, sin_rows, is_row, dims, KEY_DIM: tl.constexpr, HALF: tl.constexpr, IS_PAIRED: tl.constexpr,
    IN_QUADS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Queries [rows, dims], and those of the other dims if keys are read in pairs (see `_key_halves`): float32 then."""
    if IS_PAIRED:
        numbers = first_dims(dims, IN_QUADS)
        others = numbers + (2 if IN_QUADS else 1)
        first = rotated(q_rows, cos_rows, sin_rows, is_row, numbers, 2 * KEY_DIM, HALF, dtype).to(tl.float32)
        second = rotated(q_rows, cos_rows, sin_rows, is_row, others, 2 * KEY_DIM, HALF, dtype).to(tl.float32)
        return first, second
    else:
        numbers = rotated(q_rows, cos_rows, sin_rows, is_row, dims, KEY_DIM, HALF, dtype)
        return numbers, numbers


@triton.jit
def query_tile(
    q_rows, cos_rows, sin_rows, is_row, scale, KEY_DIM: tl.constexpr, FIRST_DIMS: tl.constexpr,
    REST_DIMS: tl.constexpr, REST_PAD: tl.constexpr, TILE_ROWS: tl.constexpr, HALF: tl.constexpr,
    IS_PAIRED: tl.constexpr, IN_QUADS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The queries of a tile, the rest of their dims, both again for odd dims, and the factor of each row's logits."""
    dims = tl.arange(0, FIRST_DIMS)
    rest = FIRST_DIMS + tl.arange(0, REST_PAD)
    first, first_odd = _load_queries(
        q_rows, cos_rows, sin_rows, is_row, dims, KEY_DIM, HALF, IS_PAIRED, IN_QUADS, dtype
    )
    others, others_odd = first, first
    if REST_DIMS > 0:
        others, others_odd = _load_queries(
            q_rows, cos_rows, sin_rows, is_row, rest, KEY_DIM, HALF, IS_PAIRED, IN_QUADS, dtype
        )
    factor = tl.full((TILE_ROWS,), scale, tl.float32)
    if IS_PAIRED:
        magnitude = tl.max(tl.maximum(tl.abs(first), tl.abs(first_odd)), axis=1)
        if REST_DIMS > 0:
            magnitude = tl.maximum(magnitude, tl.max(tl.maximum(tl.abs(others), tl.abs(others_odd)), axis=1))
        magnitude = tl.where(magnitude == 0.0, 1.0, magnitude)
        factor = factor * magnitude
        first, first_odd = (first / magnitude[:, None]).to(tl.float16), (first_odd / magnitude[:, None]).to(tl.float16)
        others = (others / magnitude[:, None]).to(tl.float16)
        others_odd = (others_odd / magnitude[:, None]).to(tl.float16)
    return first, others, first_odd, others_odd, factor


@triton.jit
def _key_halves(pairs, IN_ASSEMBLY: tl.constexpr, IN_QUADS: tl.constexpr):
    """The numbers of keys in pairs for two products: of the dims 0, 1, 4, 5, ..., or of the even dims."""
    if IN_QUADS:
        return float8_quads(pairs)
    else:
        return float8_halves(pairs, IN_ASSEMBLY)


@triton.jit
def _block_logits(
    q_first, q_rest, q_first_odd, q_rest_odd, zeros, key_rows, is_key, KEY_DIM: tl.constexpr,
    FIRST_DIMS: tl.constexpr, REST_DIMS: tl.constexpr, REST_PAD: tl.constexpr, IS_PAIRED: tl.constexpr,
    KEY_AXIS: tl.constexpr, IN_ASSEMBLY: tl.constexpr, IN_QUADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the queries and the keys of a block."""
    rest = FIRST_DIMS + tl.arange(0, REST_PAD)
    k = _load_rows(key_rows, is_key, tl.arange(0, FIRST_DIMS), KEY_DIM)
    if IS_PAIRED:
        even, odd = _key_halves(k, IN_ASSEMBLY, IN_QUADS)
        logits = _logits(q_first, even, zeros, KEY_AXIS, PRECISION)
        logits = _logits(q_first_odd, odd, logits, KEY_AXIS, PRECISION)
        if REST_DIMS > 0:
            even, odd = _key_halves(_load_rows(key_rows, is_key, rest, KEY_DIM), IN_ASSEMBLY, IN_QUADS)
            logits = _logits(q_rest, even, logits, KEY_AXIS, PRECISION)
            logits = _logits(q_rest_odd, odd, logits, KEY_AXIS, PRECISION)
    else:
        logits = _logits(q_first, k.to(q_first.dtype), zeros, KEY_AXIS, PRECISION)
        if REST_DIMS > 0:
            k = _load_rows(key_rows, is_key, rest, KEY_DIM).to(q_first.dtype)
            logits = _logits(q_rest, k, logits, KEY_AXIS, PRECISION)
    return logits


@triton.jit
def walk(
    q_first, q_rest, q_first_odd, q_rest_odd, factor, own_row, keys, values, table, start, stop, lowest, window,
    stride_kx, stride_kp, stride_vx, stride_vp, KEY_DIM: tl.constexpr, FIRST_DIMS: tl.constexpr,
    REST_DIMS: tl.constexpr, REST_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_PAIRED: tl.constexpr, KEY_AXIS: tl.constexpr, IN_ASSEMBLY: tl.constexpr, IN_QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The maximum, the sum, and the weighted values [rows, dims] of a tile over the keys from `start` to `stop`."""
    own_row, factor = tl.expand_dims(own_row, KEY_AXIS), tl.expand_dims(factor, KEY_AXIS)
    largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    if KEY_AXIS == 0:
        zeros = tl.zeros((BLOCK, TILE_ROWS), tl.float32)
        total = zeros
        sum_values = tl.zeros((VALUE_PAD, TILE_ROWS), tl.float32)
    else:
        zeros = tl.zeros((TILE_ROWS, BLOCK), tl.float32)
        total = tl.zeros((TILE_ROWS,), tl.float32)
        sum_values = tl.zeros((TILE_ROWS, VALUE_PAD), tl.float32)
    sum_odd = sum_values
    for block in range(start, stop, BLOCK):
        position = block + tl.arange(0, BLOCK)
        is_key = (position >= lowest) & (position < stop)
        key_offset, value_offset = _offsets_of(table, block, position, is_key, stop, stride_kx, stride_vx, PAGE, PAGES)
        slot = position % PAGE if PAGES == 0 else position & (PAGE - 1)
        logits = _block_logits(
            q_first, q_rest, q_first_odd, q_rest_odd, zeros, (keys + key_offset + slot * stride_kp)[:, None], is_key,
            KEY_DIM, FIRST_DIMS, REST_DIMS, REST_PAD, IS_PAIRED, KEY_AXIS, IN_ASSEMBLY, IN_QUADS, PRECISION,
        )  # fmt: skip
        own_key = tl.expand_dims(position, 1 - KEY_AXIS)
        is_seen = tl.expand_dims(is_key, 1 - KEY_AXIS) & (own_key <= own_row)
        if HAS_WINDOW:
            is_seen = is_seen & (own_key > own_row - window)
        logits = tl.where(is_seen, logits * factor, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=KEY_AXIS))
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        probabilities = tl.exp2(logits - tl.expand_dims(safe, KEY_AXIS))
        shrink = tl.exp2(largest - safe)
        if KEY_AXIS == 0:  # the sum over keys comes after the loop, because several warps share the keys
            total = total * shrink[None, :] + probabilities
        else:
            total = total * shrink + tl.sum(probabilities, axis=1)
        shrink = tl.expand_dims(shrink, KEY_AXIS)
        value_rows = (values + value_offset + slot * stride_vp)[:, None]
        v = _load_rows(value_rows, is_key, tl.arange(0, VALUE_PAD), VALUE_DIM)
        if IS_PAIRED:
            v, odd = float8_halves(v, IN_ASSEMBLY)
            sum_odd = _weighted(probabilities, odd, sum_odd * shrink, KEY_AXIS, PRECISION)
        sum_values = _weighted(probabilities, v.to(q_first.dtype), sum_values * shrink, KEY_AXIS, PRECISION)
        largest = new_largest
    if KEY_AXIS == 0:
        total, sum_values, sum_odd = tl.sum(total, axis=0), tl.trans(sum_values), tl.trans(sum_odd)
    if IS_PAIRED:
        sum_values = tl.reshape(tl.join(sum_values, sum_odd), (TILE_ROWS, 2 * VALUE_PAD))
    return largest, total, sum_values


@triton.jit
def store_result(
    out, sink, largest, total, sum_values, token, head, is_row, num_heads, NUM_DIMS: tl.constexpr, DIMS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Divide the weighted values of a tile by their sums, to which a sink adds, and store them."""
    dims = tl.arange(0, DIMS)
    if HAS_SINK:
        sink_rows = tl.load(sink + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
        new_largest = tl.maximum(largest, sink_rows)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.exp2(sink_rows - new_largest)
        sum_values = sum_values * shrink[:, None]
    place = (token.to(tl.int64) * num_heads + head)[:, None] * NUM_DIMS + dims[None, :]
    result = sum_values / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + place, result, mask=is_row[:, None] & (dims < NUM_DIMS)[None, :])


@triton.jit
def _attend_part(
    q, keys, values, tables, query_lengths, key_lengths, sink, out, partial, maxima, sums, scale, window,
    stride_qt, stride_qn, stride_kx, stride_kp, stride_kg, stride_vx, stride_vp, stride_vg, stride_tb,
    num_heads, num_groups, num_parts,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, FIRST_DIMS: tl.constexpr, REST_DIMS: tl.constexpr,
    REST_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, PAGE: tl.constexpr,
    PAGES: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, ROW_TILES: tl.constexpr,
    SEQUENCES: tl.constexpr, LARGEST_PART: tl.constexpr, HAS_SINK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_COMBINED: tl.constexpr, IS_PAIRED: tl.constexpr, KEY_AXIS: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
    IN_QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    group, row_tile = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES
    b = tl.program_id(1)
    part = num_parts - 1 - tl.program_id(2)  # long parts first
    first_query, num_queries, num_keys = span(query_lengths, key_lengths, b, SEQUENCES)
    start, stop, lowest = num_keys * 0, num_keys, num_keys * 0
    if IS_COMBINED:
        start, size = _part(part, LARGEST_PART)
        stop = tl.minimum(start + size, num_keys)
    if HAS_WINDOW:
        lowest = tl.maximum(num_keys - num_queries - window + 1, 0)
        start = tl.maximum(start, lowest // BLOCK * BLOCK)
    if (row_tile * TILE_ROWS < num_queries * HEADS) & (start < stop):
        rows = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        query, head = rows // HEADS, group * HEADS + rows % HEADS
        is_row = query < num_queries
        q_rows = q + (first_query + query).to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qn
        q_first, q_rest, q_first_odd, q_rest_odd, factor = query_tile(
            q_rows, q_rows, q_rows, is_row, scale, KEY_DIM, FIRST_DIMS, REST_DIMS, REST_PAD, TILE_ROWS, 0, IS_PAIRED,
            IN_QUADS, q.dtype.element_ty,
        )  # fmt: skip
        largest, total, sum_values = walk(
            q_first, q_rest, q_first_odd, q_rest_odd, factor, num_keys - num_queries + query,
            keys + group * stride_kg, values + group * stride_vg, tables + b * stride_tb, start, stop, lowest, window,
            stride_kx, stride_kp, stride_vx, stride_vp, KEY_DIM, FIRST_DIMS, REST_DIMS, REST_PAD, VALUE_DIM, VALUE_PAD,
            PAGE, PAGES, BLOCK, TILE_ROWS, HAS_WINDOW, IS_PAIRED, KEY_AXIS, IN_ASSEMBLY, IN_QUADS, PRECISION,
        )  # fmt: skip
        DIMS: tl.constexpr = VALUE_PAD * 2 if IS_PAIRED else VALUE_PAD
        NUM_DIMS: tl.constexpr = VALUE_DIM * 2 if IS_PAIRED else VALUE_DIM
        if IS_COMBINED:
            place = ((b * num_groups + group) * num_parts + part).to(tl.int64) * (ROW_TILES * TILE_ROWS) + rows
            tl.store(maxima + place, largest)
            tl.store(sums + place, total)
            dims = tl.arange(0, DIMS)
            place = place[:, None] * NUM_DIMS + dims[None, :]
            tl.store(partial + place, sum_values, mask=(dims < NUM_DIMS)[None, :])
        else:
            store_result(
                out, sink, largest, total, sum_values, first_query + query, head, is_row, num_heads, NUM_DIMS, DIMS,
                HAS_SINK,
            )  # fmt: skip


@triton.jit
def _combine_parts(
    partial, maxima, sums, query_lengths, key_lengths, sink, out, window, num_heads, num_groups, num_parts,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, TILE_ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr, PARTS_PAD: tl.constexpr, SEQUENCES: tl.constexpr, LARGEST_PART: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_WINDOW: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    row, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query, num_queries, num_keys = span(query_lengths, key_lengths, b, SEQUENCES)
    query, head = row // HEADS, group * HEADS + row % HEADS
    if query < num_queries:
        lowest = num_keys * 0
        if HAS_WINDOW:
            lowest = tl.maximum(num_keys - num_queries - window + 1, 0)
        parts = tl.arange(0, PARTS_PAD)
        first, size = _part(parts, LARGEST_PART)
        is_used = (first < num_keys) & (first + size > lowest)
        first_place = (b * num_groups + group).to(tl.int64) * num_parts
        largest = tl.load(
            maxima + (first_place + parts) * (ROW_TILES * TILE_ROWS) + row, mask=is_used, other=float("-inf")
        )
        top = tl.max(largest)
        if HAS_SINK:
            sink_logit = tl.load(sink + head).to(tl.float32) * 1.4426950408889634
            top = tl.maximum(top, sink_logit)
        total = top * 0.0
        v_dims = tl.arange(0, VALUE_PAD)
        is_dim = v_dims < VALUE_DIM
        result = tl.zeros((VALUE_PAD,), tl.float32)
        begin = tl.sum((first + size <= lowest).to(tl.int32))
        end = tl.sum((first < num_keys).to(tl.int32))
        # in order, so that the bits do not depend on the number of parts; AHEAD parts are read at once
        for base in range(begin, end, AHEAD):
            for number in tl.static_range(AHEAD):
                part = base + number
                place = (first_place + part) * (ROW_TILES * TILE_ROWS) + row
                scale = tl.exp2(tl.load(maxima + place, mask=part < end, other=float("-inf")) - top)
                total += scale * tl.load(sums + place, mask=part < end, other=0.0)
                weighted = tl.load(partial + place * VALUE_DIM + v_dims, mask=is_dim & (part < end), other=0.0)
                result += scale * weighted
        if HAS_SINK:
            total += tl.exp2(sink_logit - top)
        place_out = ((first_query + query).to(tl.int64) * num_heads + head) * VALUE_DIM
        tl.store(out + place_out + v_dims, result / total, mask=is_dim)
