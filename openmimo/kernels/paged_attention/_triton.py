"""Triton kernels of paged attention.

A program computes the rows (queries of a sequence times query heads of a group) of one key/value head against one part
of SPLIT_KEYS keys. Parts have a fixed number of keys, so that the bits of a row do not depend on the batch. Sequences
with more keys than a part are combined by a second kernel; layers with a window have one part:

    keys of a sequence     0 ........ 255 | 256 ....... 511 | 512 ... 700
    program                     part 0    |     part 1      |    part 2      -> (max, sum, weighted values) each
    combine                               one row of one head: rescales the parts, adds the sink

Where block scores are requested, the first kernel also stores the largest logit of each row in each block of BLOCK
keys, and the second one the logarithm of the denominator of each row.

The keys of a page are read once for all rows of the group. Key dims are read as two powers of two (192 = 128 + 64).
"""

import torch
import triton
import triton.language as tl

from openmimo.kernels.attention import Pages

SPLIT_KEYS = 256
BLOCK_KEYS = 64
_MAX_ROWS = 64
_MIN_TILE = 16  # of a matrix product


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
    scores: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention output [T, N, V], and scores [B, G, C, queries] of blocks of BLOCK_KEYS keys if requested.

    Other arguments are as in `openmimo.kernels.attention.paged_attend`.

    Rows of queries beyond the sum of `query_lengths_B` are not written. A sequence may have no queries and no keys.
    """
    keys_XPGK, values_XPGV, tables_BY = pages
    T, N, K = q_TNK.shape
    _, P, G, V = values_XPGV.shape
    B = tables_BY.shape[0]
    out_TNV = q_TNK.new_empty(T, N, V)
    reach = longest_key if window_keys is None else window_keys + longest_query - 1
    num_parts = triton.cdiv(reach, SPLIT_KEYS)
    is_combined = window_keys is None or num_parts > 1  # not by the longest key: the bits would depend on the batch
    rows = triton.next_power_of_2(longest_query) * (N // G)
    tile_rows = max(_MIN_TILE, min(_MAX_ROWS, triton.next_power_of_2(rows)))
    row_tiles = triton.cdiv(rows, tile_rows)
    partial = maxima = sums = out_TNV
    if is_combined:
        shape = (B, G, num_parts, row_tiles * tile_rows)
        partial = q_TNK.new_empty(*shape, V, dtype=torch.float32)
        maxima, sums = (q_TNK.new_empty(shape, dtype=torch.float32) for _ in range(2))
    num_blocks = triton.cdiv(longest_key, BLOCK_KEYS) if scores else 0
    largest_logits = denominators = out_TNV
    if scores:
        largest_logits, denominators = (
            q_TNK.new_full((B, G, blocks, row_tiles * tile_rows), unwritten, dtype=torch.float32)
            for blocks, unwritten in ((num_blocks, float("-inf")), (1, float("inf")))
        )
    first_dims = 1 << (K.bit_length() - 1)
    rest_dims = K - first_dims
    strides = (
        q_TNK.stride(0), q_TNK.stride(1), keys_XPGK.stride(0), keys_XPGK.stride(1), keys_XPGK.stride(2),
        values_XPGV.stride(0), values_XPGV.stride(1), values_XPGV.stride(2), tables_BY.stride(0),
    )  # fmt: skip
    shape_arguments = dict(
        num_heads=N, num_groups=G, HEADS=N // G, VALUE_DIM=V, TILE_ROWS=tile_rows, ROW_TILES=row_tiles,
        NUM_PARTS=num_parts, IS_COMBINED=is_combined, SPLIT=SPLIT_KEYS,
        HAS_SINK=sink_N is not None, HAS_WINDOW=window_keys is not None, HAS_SCORES=scores,
        SEQUENCES=triton.next_power_of_2(B), VALUE_PAD=max(_MIN_TILE, triton.next_power_of_2(V)),
    )  # fmt: skip
    _attend_part[(num_parts * row_tiles, G, B)](
        q_TNK, keys_XPGK, values_XPGV, tables_BY, query_lengths_B, key_lengths_B, sink_N, out_TNV,
        partial, maxima, sums, largest_logits, K**-0.5, window_keys or 0, num_blocks, *strides,
        KEY_DIM=K, FIRST_DIMS=max(_MIN_TILE, first_dims), REST_DIMS=rest_dims,
        REST_PAD=max(_MIN_TILE, triton.next_power_of_2(max(rest_dims, 1))), PAGE=P, BLOCK=BLOCK_KEYS,
        PRECISION="ieee" if q_TNK.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=3, **shape_arguments,
    )  # fmt: skip
    if is_combined:
        _combine_parts[(row_tiles * tile_rows, G, B)](
            partial, maxima, sums, denominators, query_lengths_B, key_lengths_B, sink_N, out_TNV, window_keys or 0,
            PARTS_PAD=triton.next_power_of_2(num_parts), num_warps=2, **shape_arguments,
        )  # fmt: skip
    return out_TNV, _largest_probabilities(largest_logits, denominators, N // G) if scores else None


def _largest_probabilities(logits_BGCM: torch.Tensor, denominators_BG1M: torch.Tensor, heads: int) -> torch.Tensor:
    """Probabilities of the largest logits of rows, and their maximum over the heads of a query: [B, G, C, queries]."""
    probabilities_BGCM = (logits_BGCM - denominators_BG1M).exp()
    queries = probabilities_BGCM.shape[3] // heads
    return probabilities_BGCM[..., : queries * heads].unflatten(3, (queries, heads)).amax(4)


@triton.jit
def _span(query_lengths, key_lengths, b, window, SEQUENCES: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first query row of sequence b, its numbers of queries and keys, and its first key within reach."""
    earlier = tl.arange(0, SEQUENCES)
    first_query = tl.sum(tl.load(query_lengths + earlier, mask=earlier < b, other=0))
    num_queries = tl.load(query_lengths + b)
    num_keys = tl.load(key_lengths + b)
    lowest = num_keys * 0
    if HAS_WINDOW:
        lowest = tl.maximum(num_keys - num_queries - window + 1, 0)
    return first_query, num_queries, num_keys, lowest


@triton.jit
def _load_rows(rows, is_row, dims, num_dims):
    """A tile [rows, dims] from the addresses of rows; 0 outside."""
    return tl.load(rows + dims[None, :], mask=is_row[:, None] & (dims < num_dims)[None, :], other=0.0)


@triton.jit
def _attend_part(
    q, keys, values, tables, query_lengths, key_lengths, sink, out, partial, maxima, sums, largest_logits, scale,
    window, num_blocks, stride_qt, stride_qn, stride_kx, stride_kp, stride_kg, stride_vx, stride_vp, stride_vg,
    stride_tb, num_heads, num_groups, HEADS: tl.constexpr, KEY_DIM: tl.constexpr, FIRST_DIMS: tl.constexpr,
    REST_DIMS: tl.constexpr, REST_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, TILE_ROWS: tl.constexpr, ROW_TILES: tl.constexpr,
    NUM_PARTS: tl.constexpr, IS_COMBINED: tl.constexpr, SEQUENCES: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) // ROW_TILES
    row_tile = tl.program_id(0) % ROW_TILES
    group, b = tl.program_id(1), tl.program_id(2)
    first_query, num_queries, num_keys, lowest = _span(query_lengths, key_lengths, b, window, SEQUENCES, HAS_WINDOW)
    start = lowest + part * SPLIT
    stop = tl.minimum(start + SPLIT, num_keys)
    if (row_tile * TILE_ROWS < num_queries * HEADS) & (start < num_keys):
        rows = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        query, head = rows // HEADS, group * HEADS + rows % HEADS
        is_row = query < num_queries
        own = num_keys - num_queries + query
        q_rows = q + (first_query + query).to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qn
        dims = tl.arange(0, FIRST_DIMS)
        rest = FIRST_DIMS + tl.arange(0, REST_PAD)
        v_dims = tl.arange(0, VALUE_PAD)
        q_first = _load_rows(q_rows, is_row, dims, KEY_DIM)
        q_rest = _load_rows(q_rows, is_row, rest, KEY_DIM)
        largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((TILE_ROWS,), tl.float32)
        sum_values = tl.zeros((TILE_ROWS, VALUE_PAD), tl.float32)
        for block in range(start, stop, BLOCK):
            position = block + tl.arange(0, BLOCK)
            is_key = position < stop
            page = tl.load(tables + b * stride_tb + position // PAGE, mask=is_key, other=0).to(tl.int64)
            slot = position % PAGE
            key_rows = keys + page[:, None] * stride_kx + slot[:, None] * stride_kp + group * stride_kg
            k = _load_rows(key_rows, is_key, dims, KEY_DIM).to(q_first.dtype)
            logits = tl.dot(q_first, tl.trans(k), input_precision=PRECISION)
            if REST_DIMS > 0:
                k = _load_rows(key_rows, is_key, rest, KEY_DIM).to(q_first.dtype)
                logits += tl.dot(q_rest, tl.trans(k), input_precision=PRECISION)
            is_seen = is_key[None, :] & (position[None, :] <= own[:, None])
            if HAS_WINDOW:
                is_seen = is_seen & (position[None, :] > own[:, None] - window)
            logits = tl.where(is_seen, logits * scale, float("-inf"))
            most = tl.max(logits, axis=1)
            if HAS_SCORES:
                number = (b * num_groups + group) * num_blocks + block // BLOCK
                tl.store(largest_logits + number.to(tl.int64) * (ROW_TILES * TILE_ROWS) + rows, most)
            new_largest = tl.maximum(largest, most)
            safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            probabilities = tl.exp(logits - safe[:, None])
            shrink = tl.exp(largest - safe)
            total = total * shrink + tl.sum(probabilities, axis=1)
            value_rows = values + page[:, None] * stride_vx + slot[:, None] * stride_vp + group * stride_vg
            v = _load_rows(value_rows, is_key, v_dims, VALUE_DIM).to(q_first.dtype)
            weighted = tl.dot(probabilities.to(v.dtype), v, input_precision=PRECISION)
            sum_values = sum_values * shrink[:, None] + weighted
            largest = new_largest
        if not IS_COMBINED:
            place = ((first_query + query).to(tl.int64) * num_heads + head)[:, None] * VALUE_DIM + v_dims[None, :]
            if HAS_SINK:
                sink_rows = tl.load(sink + head, mask=is_row, other=0.0).to(tl.float32)
                largest, total, sum_values = _with_sink(largest, total, sum_values, sink_rows)
            result = sum_values / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + place, result, mask=is_row[:, None] & (v_dims < VALUE_DIM)[None, :])
        else:
            place = ((b * num_groups + group) * NUM_PARTS + part).to(tl.int64) * (ROW_TILES * TILE_ROWS) + rows
            tl.store(maxima + place, largest)
            tl.store(sums + place, total)
            place = place[:, None] * VALUE_DIM + v_dims[None, :]
            tl.store(partial + place, sum_values, mask=(v_dims < VALUE_DIM)[None, :])


@triton.jit
def _with_sink(largest, total, sum_values, sink_rows):
    """The running maximum, sum and weighted values of rows after a key of logit `sink_rows` without a value."""
    new_largest = tl.maximum(largest, sink_rows)
    shrink = tl.exp(largest - new_largest)
    return new_largest, total * shrink + tl.exp(sink_rows - new_largest), sum_values * shrink[:, None]


@triton.jit
def _combine_parts(
    partial, maxima, sums, denominators, query_lengths, key_lengths, sink, out, window, num_heads, num_groups,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, SPLIT: tl.constexpr,
    TILE_ROWS: tl.constexpr, ROW_TILES: tl.constexpr, NUM_PARTS: tl.constexpr,
    IS_COMBINED: tl.constexpr, PARTS_PAD: tl.constexpr,
    SEQUENCES: tl.constexpr, HAS_SINK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SCORES: tl.constexpr,
):  # fmt: skip
    row, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query, num_queries, num_keys, lowest = _span(query_lengths, key_lengths, b, window, SEQUENCES, HAS_WINDOW)
    query, head = row // HEADS, group * HEADS + row % HEADS
    if query < num_queries:
        parts = tl.arange(0, PARTS_PAD)
        is_used = parts * SPLIT < num_keys - lowest
        place = ((b * num_groups + group) * NUM_PARTS + parts).to(tl.int64) * (ROW_TILES * TILE_ROWS) + row
        largest = tl.load(maxima + place, mask=is_used, other=float("-inf"))
        top = tl.max(largest)
        if HAS_SINK:
            top = tl.maximum(top, tl.load(sink + head).to(tl.float32))
        total = top * 0.0
        v_dims = tl.arange(0, VALUE_PAD)
        result = tl.zeros((VALUE_PAD,), tl.float32)
        for part in range(0, tl.cdiv(num_keys - lowest, SPLIT)):
            this = ((b * num_groups + group) * NUM_PARTS + part).to(tl.int64) * (ROW_TILES * TILE_ROWS) + row
            scale = tl.exp(tl.load(maxima + this) - top)
            total += scale * tl.load(sums + this)  # in order, so that the bits do not depend on the number of parts
            result += scale * tl.load(partial + this * VALUE_DIM + v_dims, mask=v_dims < VALUE_DIM, other=0.0)
        if HAS_SINK:
            total += tl.exp(tl.load(sink + head).to(tl.float32) - top)
        if HAS_SCORES:
            tl.store(denominators + (b * num_groups + group) * (ROW_TILES * TILE_ROWS) + row, top + tl.log(total))
        place_out = ((first_query + query).to(tl.int64) * num_heads + head) * VALUE_DIM
        tl.store(out + place_out + v_dims, result / total, mask=v_dims < VALUE_DIM)
