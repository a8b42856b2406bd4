"""Triton kernels of paged attention.

A program computes the rows (queries of a sequence times query heads of a group) of one key/value head against one part
of the keys. The parts of a sequence begin at fixed positions, so that the bits of a row depend neither on the batch nor
on the length of the text. Later parts have more keys: a short text is spread over many programs, and a long one has few
partial results. Sequences with more keys than a part are combined by a second kernel; layers with a window have one
part, which begins at a multiple of the block:

    keys of a sequence     0 .... 255 | ... | 1792 .. 2047 | 2048 .. 2559 | ... | 4096 .. 5119 | ... | 8192 .. 10239 | ...
    part                       0      | ... |      7       |      8       | ... |      12      | ... |      16       | ...
    result of a program    (max, sum, weighted values) of each row
    combine                one row of one head: rescales the parts in order, adds the sink

The keys of a page are read once for all rows of the group. A matrix unit of Hopper takes 64 rows of its first operand.
These are keys (and dims of values) while there are fewer rows than 64. Key dims are read as two powers of two
(192 = 128 + 64). Exponents are of base 2.

A cache in float8_e4m3fn is read as pairs of numbers, 16 bits each. The even and the odd numbers are converted to float16,
which holds every value of the format and which takes one instruction for two numbers. (bfloat16 takes two more for each
number, which are slower than the memory.) Queries are divided by their largest magnitude for float16, and the logits
multiplied by it:

    keys, 16 bits     (k0 k1) (k2 k3) ...  ->  even k0 k2 ...   odd k1 k3 ...
    logits            q_even x even  +  q_odd x odd
    values            two sums, of the even and of the odd dims, which are joined at the end
"""

import torch
import triton
import triton.language as tl

from openmimo.kernels.attention import Pages
from openmimo.kernels.linear._float8 import float8_halves, in_assembly

_MAX_ROWS = 64
_WIDE_ROWS = 64  # rows of the first operand of a matrix unit
_MIN_TILE = 16  # of a matrix product
_MAX_WINDOW_OF_A_PART = 512
_PARTS_AHEAD = 32
_LOG2_E = 1.4426950408889634
_BLOCK_KEYS = 64
_WARPS = 4
_LARGEST_PART = 2048
_STAGES = 3


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
    keys_XPGK, values_XPGV, tables_BY = pages
    T, N, K = q_TNK.shape
    _, P, G, V = values_XPGV.shape
    B = tables_BY.shape[0]
    out_TNV = q_TNK.new_empty(T, N, V)
    # not by the longest key: the bits would depend on the batch
    is_combined = window_keys is None or window_keys > _MAX_WINDOW_OF_A_PART
    num_parts = count_parts(longest_key) if is_combined else 1
    rows = triton.next_power_of_2(longest_query) * (N // G)
    tile_rows = max(_MIN_TILE, min(_MAX_ROWS, triton.next_power_of_2(rows)))
    row_tiles = triton.cdiv(rows, tile_rows)
    partial = maxima = sums = out_TNV
    if is_combined:
        shape = (B, G, num_parts, row_tiles * tile_rows)
        partial = q_TNK.new_empty(*shape, V, dtype=torch.float32)
        maxima, sums = (q_TNK.new_empty(shape, dtype=torch.float32) for _ in range(2))
    is_paired = _is_paired(q_TNK, pages)
    if is_paired:
        keys_XPGK, values_XPGV = keys_XPGK.view(torch.int16), values_XPGV.view(torch.int16)
    K, value_dim = keys_XPGK.shape[3], values_XPGV.shape[3]
    first_dims = 1 << (K.bit_length() - 1)
    strides = (
        q_TNK.stride(0), q_TNK.stride(1), keys_XPGK.stride(0), keys_XPGK.stride(1), keys_XPGK.stride(2),
        values_XPGV.stride(0), values_XPGV.stride(1), values_XPGV.stride(2), tables_BY.stride(0),
    )  # fmt: skip
    shape_arguments = dict(
        num_heads=N, num_groups=G, num_parts=num_parts, HEADS=N // G, TILE_ROWS=tile_rows, ROW_TILES=row_tiles,
        HAS_SINK=sink_N is not None, HAS_WINDOW=window_keys is not None, SEQUENCES=triton.next_power_of_2(B), LARGEST_PART=_LARGEST_PART,
    )  # fmt: skip
    _attend_part[(G * row_tiles, B, num_parts)](
        q_TNK, keys_XPGK, values_XPGV, tables_BY, query_lengths_B, key_lengths_B, sink_N, out_TNV,
        partial, maxima, sums, q_TNK.shape[2] ** -0.5 * _LOG2_E, window_keys or 0, *strides,
        KEY_DIM=K, FIRST_DIMS=max(_MIN_TILE, first_dims), REST_DIMS=K - first_dims,
        REST_PAD=max(_MIN_TILE, triton.next_power_of_2(max(K - first_dims, 1))),
        VALUE_DIM=value_dim, VALUE_PAD=max(_MIN_TILE, triton.next_power_of_2(value_dim)),
        PAGE=P, PAGES=max(1, _BLOCK_KEYS // P) if P & (P - 1) == 0 else 0, BLOCK=_BLOCK_KEYS,
        IS_COMBINED=is_combined, IS_PAIRED=is_paired, KEY_AXIS=0 if tile_rows < _WIDE_ROWS else 1,
        IN_ASSEMBLY=in_assembly(), PRECISION="ieee" if q_TNK.dtype == torch.float32 else "tf32",
        num_warps=_WARPS, num_stages=_STAGES,
        maxnreg=_registers(q_TNK.dtype, is_paired, tile_rows), **shape_arguments,
    )  # fmt: skip
    if is_combined:
        _combine_parts[(row_tiles * tile_rows, G, B)](
            partial, maxima, sums, query_lengths_B, key_lengths_B, sink_N, out_TNV, window_keys or 0,
            PARTS_PAD=triton.next_power_of_2(num_parts), AHEAD=min(_PARTS_AHEAD, triton.next_power_of_2(num_parts)),
            VALUE_DIM=V, VALUE_PAD=triton.next_power_of_2(V), num_warps=1, **shape_arguments,
        )  # fmt: skip
    return out_TNV


def _registers(dtype: torch.dtype, is_paired: bool, tile_rows: int) -> int | None:
    """The most registers of a thread, so that four programs run on a multiprocessor, or three; None for no limit."""
    if dtype == torch.float32:
        return None
    if tile_rows < _WIDE_ROWS:
        return 128
    return 168 if is_paired else None


def _is_paired(q_TNK: torch.Tensor, pages: Pages) -> bool:
    """Whether the cache is read as pairs of float8 numbers."""
    keys, values = pages.keys_XPGK, pages.values_XPGV
    places = (keys.shape[3], values.shape[3], *keys.stride()[:3], *values.stride()[:3], keys.storage_offset())
    is_even = all(number % 2 == 0 for number in (*places, values.storage_offset()))
    return is_even and keys.dtype == torch.float8_e4m3fn and q_TNK.dtype in (torch.bfloat16, torch.float16)


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
def _span(query_lengths, key_lengths, b, SEQUENCES: tl.constexpr):
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
    """The offsets of the pages of a block's keys and values. If a block begins with a page, pages are read as scalars."""
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
def _load_queries(q_rows, is_row, dims, KEY_DIM: tl.constexpr, IS_PAIRED: tl.constexpr):
    """Queries [rows, dims], and if keys are read in pairs those of the odd dims: float32 then."""
    if IS_PAIRED:
        even = _load_rows(q_rows, is_row, 2 * dims, 2 * KEY_DIM).to(tl.float32)
        return even, _load_rows(q_rows, is_row, 2 * dims + 1, 2 * KEY_DIM).to(tl.float32)
    else:
        numbers = _load_rows(q_rows, is_row, dims, KEY_DIM)
        return numbers, numbers


@triton.jit
def _attend_part(
    q, keys, values, tables, query_lengths, key_lengths, sink, out, partial, maxima, sums, scale, window,
    stride_qt, stride_qn, stride_kx, stride_kp, stride_kg, stride_vx, stride_vp, stride_vg, stride_tb,
    num_heads, num_groups, num_parts,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, FIRST_DIMS: tl.constexpr, REST_DIMS: tl.constexpr,
    REST_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, PAGE: tl.constexpr,
    PAGES: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, ROW_TILES: tl.constexpr,
    SEQUENCES: tl.constexpr, LARGEST_PART: tl.constexpr, HAS_SINK: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_COMBINED: tl.constexpr,
    IS_PAIRED: tl.constexpr, KEY_AXIS: tl.constexpr, IN_ASSEMBLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, row_tile = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES
    b = tl.program_id(1)
    part = num_parts - 1 - tl.program_id(2)  # long parts first
    first_query, num_queries, num_keys = _span(query_lengths, key_lengths, b, SEQUENCES)
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
        own_row = tl.expand_dims(num_keys - num_queries + query, KEY_AXIS)
        q_rows = q + (first_query + query).to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qn
        dims = tl.arange(0, FIRST_DIMS)
        rest = FIRST_DIMS + tl.arange(0, REST_PAD)
        v_dims = tl.arange(0, VALUE_PAD)
        q_first, q_first_odd = _load_queries(q_rows, is_row, dims, KEY_DIM, IS_PAIRED)
        q_rest, q_rest_odd = q_first, q_first
        if REST_DIMS > 0:
            q_rest, q_rest_odd = _load_queries(q_rows, is_row, rest, KEY_DIM, IS_PAIRED)
        factor = tl.full((TILE_ROWS,), scale, tl.float32)
        if IS_PAIRED:
            magnitude = tl.max(tl.maximum(tl.abs(q_first), tl.abs(q_first_odd)), axis=1)
            if REST_DIMS > 0:
                magnitude = tl.maximum(magnitude, tl.max(tl.maximum(tl.abs(q_rest), tl.abs(q_rest_odd)), axis=1))
            magnitude = tl.where(magnitude == 0.0, 1.0, magnitude)
            factor = factor * magnitude
            q_first = (q_first / magnitude[:, None]).to(tl.float16)
            q_first_odd = (q_first_odd / magnitude[:, None]).to(tl.float16)
            if REST_DIMS > 0:
                q_rest = (q_rest / magnitude[:, None]).to(tl.float16)
                q_rest_odd = (q_rest_odd / magnitude[:, None]).to(tl.float16)
        factor = tl.expand_dims(factor, KEY_AXIS)
        largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
        if KEY_AXIS == 0:
            zeros = tl.zeros((BLOCK, TILE_ROWS), tl.float32)
            sum_values = tl.zeros((VALUE_PAD, TILE_ROWS), tl.float32)
        else:
            zeros = tl.zeros((TILE_ROWS, BLOCK), tl.float32)
            sum_values = tl.zeros((TILE_ROWS, VALUE_PAD), tl.float32)
        sum_odd_values = sum_values
        total = zeros if KEY_AXIS == 0 else tl.zeros((TILE_ROWS,), tl.float32)
        group_keys, group_values = keys + group * stride_kg, values + group * stride_vg
        table = tables + b * stride_tb
        for block in range(start, stop, BLOCK):
            position = block + tl.arange(0, BLOCK)
            is_key = (position >= lowest) & (position < stop)
            key_offset, value_offset = _offsets_of(
                table, block, position, is_key, stop, stride_kx, stride_vx, PAGE, PAGES
            )
            slot = position % PAGE if PAGES == 0 else position & (PAGE - 1)
            key_rows = (group_keys + key_offset + slot * stride_kp)[:, None]
            value_rows = (group_values + value_offset + slot * stride_vp)[:, None]
            k = _load_rows(key_rows, is_key, dims, KEY_DIM)
            if IS_PAIRED:
                even, odd = float8_halves(k, IN_ASSEMBLY)
                logits = _logits(q_first, even, zeros, KEY_AXIS, PRECISION)
                logits = _logits(q_first_odd, odd, logits, KEY_AXIS, PRECISION)
                if REST_DIMS > 0:
                    even, odd = float8_halves(_load_rows(key_rows, is_key, rest, KEY_DIM), IN_ASSEMBLY)
                    logits = _logits(q_rest, even, logits, KEY_AXIS, PRECISION)
                    logits = _logits(q_rest_odd, odd, logits, KEY_AXIS, PRECISION)
            else:
                logits = _logits(q_first, k.to(q_first.dtype), zeros, KEY_AXIS, PRECISION)
                if REST_DIMS > 0:
                    k = _load_rows(key_rows, is_key, rest, KEY_DIM).to(q_first.dtype)
                    logits = _logits(q_rest, k, logits, KEY_AXIS, PRECISION)
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
            v = _load_rows(value_rows, is_key, v_dims, VALUE_DIM)
            if IS_PAIRED:
                even, odd = float8_halves(v, IN_ASSEMBLY)
                sum_values = _weighted(probabilities, even, sum_values * shrink, KEY_AXIS, PRECISION)
                sum_odd_values = _weighted(probabilities, odd, sum_odd_values * shrink, KEY_AXIS, PRECISION)
            else:
                v = v.to(q_first.dtype)
                sum_values = _weighted(probabilities, v, sum_values * shrink, KEY_AXIS, PRECISION)
            largest = new_largest
        if KEY_AXIS == 0:
            total = tl.sum(total, axis=0)
            sum_values, sum_odd_values = tl.trans(sum_values), tl.trans(sum_odd_values)
        DIMS: tl.constexpr = VALUE_PAD * 2 if IS_PAIRED else VALUE_PAD
        if IS_PAIRED:
            sum_values = tl.reshape(tl.join(sum_values, sum_odd_values), (TILE_ROWS, DIMS))
        all_dims = tl.arange(0, DIMS)
        NUM_DIMS: tl.constexpr = VALUE_DIM * 2 if IS_PAIRED else VALUE_DIM
        if not IS_COMBINED:
            place = ((first_query + query).to(tl.int64) * num_heads + head)[:, None] * NUM_DIMS + all_dims[None, :]
            if HAS_SINK:
                sink_rows = tl.load(sink + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
                new_largest = tl.maximum(largest, sink_rows)
                shrink = tl.exp2(largest - new_largest)
                total = total * shrink + tl.exp2(sink_rows - new_largest)
                sum_values = sum_values * shrink[:, None]
            result = sum_values / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + place, result, mask=is_row[:, None] & (all_dims < NUM_DIMS)[None, :])
        else:
            place = ((b * num_groups + group) * num_parts + part).to(tl.int64) * (ROW_TILES * TILE_ROWS) + rows
            tl.store(maxima + place, largest)
            tl.store(sums + place, total)
            place = place[:, None] * NUM_DIMS + all_dims[None, :]
            tl.store(partial + place, sum_values, mask=(all_dims < NUM_DIMS)[None, :])


@triton.jit
def _combine_parts(
    partial, maxima, sums, query_lengths, key_lengths, sink, out, window, num_heads, num_groups, num_parts,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, TILE_ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr, PARTS_PAD: tl.constexpr, SEQUENCES: tl.constexpr, LARGEST_PART: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    row, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query, num_queries, num_keys = _span(query_lengths, key_lengths, b, SEQUENCES)
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
                result += scale * tl.load(partial + place * VALUE_DIM + v_dims, mask=is_dim & (part < end), other=0.0)
        if HAS_SINK:
            total += tl.exp2(sink_logit - top)
        place_out = ((first_query + query).to(tl.int64) * num_heads + head) * VALUE_DIM
        tl.store(out + place_out + v_dims, result / total, mask=is_dim)
