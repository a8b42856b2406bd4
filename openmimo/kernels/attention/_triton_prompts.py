"""The Triton kernel of attention of prompts.

A program computes a tile: some queries of a sequence with all query heads of one key/value head, against the keys that
any of them sees. With a window of 3, four queries and two heads, rows run over queries first:

    key                    0 1 2 3 4 5 6 7
    query 4   head 0, 1        x x x            keys 0 and 1 are not read
    query 5   head 0, 1          x x x
    query 6   head 0, 1            x x x
    query 7   head 0, 1              x x x

Keys that all queries see need no mask; in a layer without a window these are most. Softmax is computed block by block
with base 2. Key dims are read as two powers of two (192 = 128 + 64). Keys are packed, or in the pages of the cache.
"""

import math

import torch
import triton
import triton.language as tl

_TILE_ROWS = 128  # queries times query heads of a key/value head
_MIN_TILE = 16  # of a matrix product
_BLOCK_KEYS = 64


def attend_tiles(
    q_TNK: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables_BY: torch.Tensor | None,
    sink_N: torch.Tensor | None,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    *,
    longest_query: int,
    scale: float,
    window_keys: int | None,
) -> torch.Tensor:
    """Attention output [T, N, V]. Rows of queries beyond the sum of `query_lengths_B` are not written.

    Args:
        q_TNK: Packed queries.
        keys: Packed keys [S, G, K], or pages [X, P, G, K].
        values: Packed values, or pages.
        tables_BY: The pages of each sequence, int32; None for packed keys.
        sink_N: Sink logits, or None.
        query_lengths_B: Queries of each sequence, int32.
        key_lengths_B: Keys of each sequence, int32.
        longest_query: A bound of `query_lengths_B`.
        scale: Factor of the logits.
        window_keys: Keys that a query sees, its own included (None: all).
    """
    T, N, K = q_TNK.shape
    G, V = values.shape[-2:]
    B = len(query_lengths_B)
    q_TNK = q_TNK if q_TNK.stride(2) == 1 else q_TNK.contiguous()
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    out_TNV = q_TNK.new_empty(T, N, V)
    heads = triton.next_power_of_2(N // G)
    tile_queries = max(_TILE_ROWS // heads, 1)
    first_dims = 1 << (K.bit_length() - 1)
    rest_dims = K - first_dims
    is_wide = q_TNK.dtype == torch.float32
    is_paged = tables_BY is not None
    _attend_tile[(triton.cdiv(longest_query, tile_queries), G, B)](
        q_TNK, keys, values, tables_BY, sink_N, out_TNV, query_lengths_B, key_lengths_B,
        scale * math.log2(math.e), window_keys or 0, q_TNK.stride(0), q_TNK.stride(1),
        keys.stride(0), keys.stride(-3), keys.stride(-2), values.stride(0), values.stride(-3), values.stride(-2),
        tables_BY.stride(0) if tables_BY is not None else 0, N, triton.cdiv(longest_query, tile_queries),
        HEADS=N // G, HEADS_PAD=heads, ROWS=max(tile_queries * heads, _MIN_TILE), KEY_DIM=K,
        FIRST_DIMS=max(_MIN_TILE, first_dims), REST_DIMS=rest_dims,
        REST_PAD=max(_MIN_TILE, triton.next_power_of_2(max(rest_dims, 1))),
        VALUE_DIM=V, VALUE_PAD=max(_MIN_TILE, triton.next_power_of_2(V)), BLOCK=32 if is_wide else _BLOCK_KEYS,
        PAGE=keys.shape[1] if is_paged else 0, SEQUENCES=triton.next_power_of_2(B),
        HAS_SINK=sink_N is not None, HAS_WINDOW=window_keys is not None, PRECISION="ieee" if is_wide else "tf32",
        num_warps=8, num_stages=1 if is_wide else 2,
    )  # fmt: skip
    return out_TNV


@triton.jit
def _place(tables, position, is_key, PAGE: tl.constexpr, IS_MASKED: tl.constexpr):
    """The page of each position and its place there; packed keys are one page."""
    slot = position.to(tl.int64)
    page = slot * 0
    if PAGE > 0:
        if IS_MASKED:
            page = tl.load(tables + position // PAGE, mask=is_key, other=0).to(tl.int64)
        else:
            page = tl.load(tables + position // PAGE).to(tl.int64)
        slot = slot % PAGE
    return page, slot


@triton.jit
def _load_tile(rows, is_row, dims, num_dims, DIMS_PAD: tl.constexpr, DIMS: tl.constexpr, IS_MASKED: tl.constexpr):
    """A tile [rows, dims] from the addresses of rows; 0 outside."""
    if IS_MASKED or DIMS_PAD != DIMS:
        tile = tl.load(rows + dims[None, :], mask=is_row[:, None] & (dims < num_dims)[None, :], other=0.0)
    else:
        tile = tl.load(rows + dims[None, :])
    return tile


@triton.jit
def _add_keys(
    q_first, q_rest, largest, total, sum_values, k, v, tables, start, stop, own, num_keys, scale, window,
    stride_kx, stride_ks, stride_vx, stride_vs, PAGE: tl.constexpr,
    KEY_DIM: tl.constexpr, FIRST_DIMS: tl.constexpr, REST_DIMS: tl.constexpr, REST_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and weighted values after the keys from `start` to `stop`."""
    dims = tl.arange(0, FIRST_DIMS)
    rest = FIRST_DIMS + tl.arange(0, REST_PAD)
    v_dims = tl.arange(0, VALUE_PAD)
    for block in range(start, stop, BLOCK):
        position = block + tl.arange(0, BLOCK)
        is_key = position < num_keys
        page, slot = _place(tables, position, is_key, PAGE, IS_MASKED)
        key_rows = k + page[:, None] * stride_kx + slot[:, None] * stride_ks
        tile = _load_tile(key_rows, is_key, dims, KEY_DIM, FIRST_DIMS, FIRST_DIMS, IS_MASKED or KEY_DIM < FIRST_DIMS)
        logits = tl.dot(q_first, tl.trans(tile), input_precision=PRECISION)
        if REST_DIMS > 0:
            tile = _load_tile(key_rows, is_key, rest, KEY_DIM, REST_PAD, REST_DIMS, IS_MASKED)
            logits += tl.dot(q_rest, tl.trans(tile), input_precision=PRECISION)
        logits *= scale
        if IS_MASKED:
            is_seen = position[None, :] <= own[:, None]
            if HAS_WINDOW:
                is_seen = is_seen & (position[None, :] > own[:, None] - window)
            logits = tl.where(is_seen, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        safe = new_largest
        if IS_MASKED:
            safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        probabilities = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(largest - safe)
        total = total * shrink + tl.sum(probabilities, axis=1)
        value_rows = v + page[:, None] * stride_vx + slot[:, None] * stride_vs
        tile = _load_tile(value_rows, is_key, v_dims, VALUE_DIM, VALUE_PAD, VALUE_DIM, IS_MASKED)
        sum_values = sum_values * shrink[:, None]
        sum_values += tl.dot(probabilities.to(tile.dtype), tile, input_precision=PRECISION)
        largest = new_largest
    return largest, total, sum_values


@triton.jit
def _attend_tile(
    q, keys, values, tables, sink, out, query_lengths, key_lengths, scale, window,
    stride_qt, stride_qn, stride_kx, stride_ks, stride_kg, stride_vx, stride_vs, stride_vg, stride_tb, num_heads,
    num_tiles,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, ROWS: tl.constexpr, KEY_DIM: tl.constexpr,
    FIRST_DIMS: tl.constexpr, REST_DIMS: tl.constexpr, REST_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, SEQUENCES: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, b = tl.program_id(1), tl.program_id(2)
    offset = (num_tiles - 1 - tl.program_id(0)) * (ROWS // HEADS_PAD)  # tiles with the most keys begin first
    num_queries, num_keys = tl.load(query_lengths + b), tl.load(key_lengths + b)
    if offset < num_queries:
        earlier = tl.arange(0, SEQUENCES)
        first_query = tl.sum(tl.load(query_lengths + earlier, mask=earlier < b, other=0))
        rows = tl.arange(0, ROWS)
        number, head = offset + rows // HEADS_PAD, group * HEADS + rows % HEADS_PAD
        is_row = (number < num_queries) & (rows % HEADS_PAD < HEADS)
        first_own = num_keys - num_queries + offset
        own = num_keys - num_queries + number
        query = (first_query + number).to(tl.int64)
        q_rows = q + query[:, None] * stride_qt + head[:, None] * stride_qn
        dims = tl.arange(0, FIRST_DIMS)
        rest = FIRST_DIMS + tl.arange(0, REST_PAD)
        v_dims = tl.arange(0, VALUE_PAD)
        q_first = tl.load(q_rows + dims[None, :], mask=is_row[:, None] & (dims < KEY_DIM)[None, :], other=0.0)
        q_rest = tl.load(q_rows + rest[None, :], mask=is_row[:, None] & (rest < KEY_DIM)[None, :], other=0.0)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sum_values = tl.zeros((ROWS, VALUE_PAD), tl.float32)
        k, v, table = keys + group * stride_kg, values + group * stride_vg, tables
        if PAGE == 0:
            first_key = tl.sum(tl.load(key_lengths + earlier, mask=earlier < b, other=0)).to(tl.int64)
            k += first_key * stride_ks
            v += first_key * stride_vs
        else:
            table += b.to(tl.int64) * stride_tb
        start = num_keys * 0
        stop = tl.minimum(first_own + ROWS // HEADS_PAD, num_keys)
        if HAS_WINDOW:
            start = tl.maximum(first_own - window + 1, 0)
        else:
            whole = (first_own + 1) // BLOCK * BLOCK
            largest, total, sum_values = _add_keys(
                q_first, q_rest, largest, total, sum_values, k, v, table, start, whole, own, num_keys, scale, window,
                stride_kx, stride_ks, stride_vx, stride_vs, PAGE, KEY_DIM, FIRST_DIMS, REST_DIMS, REST_PAD, VALUE_DIM,
                VALUE_PAD, BLOCK, HAS_WINDOW, False, PRECISION,
            )  # fmt: skip
            start = whole
        largest, total, sum_values = _add_keys(
            q_first, q_rest, largest, total, sum_values, k, v, table, start, stop, own, num_keys, scale, window,
            stride_kx, stride_ks, stride_vx, stride_vs, PAGE, KEY_DIM, FIRST_DIMS, REST_DIMS, REST_PAD, VALUE_DIM,
            VALUE_PAD, BLOCK, HAS_WINDOW, True, PRECISION,
        )  # fmt: skip
        if HAS_SINK:
            sink_rows = tl.load(sink + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
            new_largest = tl.maximum(largest, sink_rows)
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + tl.exp2(sink_rows - new_largest)
            sum_values = sum_values * shrink[:, None]
        result = sum_values / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (query * num_heads + head)[:, None] * VALUE_DIM + v_dims[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=is_row[:, None] & (v_dims < VALUE_DIM)[None, :])
