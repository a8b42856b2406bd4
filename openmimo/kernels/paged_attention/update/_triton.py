"""Triton kernels that rotate the heads of new tokens, write their keys and values, and attend.

A layer whose window is one part needs one kernel. A program for each sequence and key/value head

    rotates and writes the keys, and scales and writes the values, of its new tokens;
    waits for its own threads, because the next step reads these keys from the pages;
    rotates its queries and walks over the window as in `openmimo.kernels.paged_attention._triton`.

No other program reads what it writes. A layer without a window has several programs for one head, so a kernel before
them rotates and writes.
"""

import torch
import triton
import triton.language as tl

from openmimo.kernels.attention import FreshHeads, Pages
from openmimo.kernels.paged_attention._triton import (
    LOG2_E,
    query_tile,
    rotated,
    span,
    store_result,
    tile_of,
    walk,
)

_HEADS = 8  # of a program that rotates


def update_window(
    fresh: FreshHeads,
    pages: Pages,
    page_T: torch.Tensor,
    slot_T: torch.Tensor,
    sink_N: torch.Tensor | None,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    *,
    longest_query: int,
    window_keys: int,
) -> torch.Tensor:
    """Attention output [T, N, V]; arguments as in `openmimo.kernels.attention.update_and_attend`."""
    joined_TJ, N, G, K, V = fresh.joined_TJ, fresh.num_heads, fresh.num_kv_heads, fresh.key_dim, fresh.value_dim
    cos_TR, sin_TR = _tables(fresh)
    B = pages.tables_BY.shape[0]
    out_TNV = joined_TJ.new_empty(joined_TJ.shape[0], N, V)
    tile = tile_of(joined_TJ.dtype, pages, N, longest_query)
    _update_window[(G * tile.num_tiles, B)](
        joined_TJ, cos_TR, sin_TR, pages.keys_XPGK, pages.values_XPGV, tile.keys, tile.values,
        pages.tables_BY, page_T, slot_T, query_lengths_B, key_lengths_B, sink_N, out_TNV, K**-0.5 * LOG2_E, window_keys,
        fresh.value_scale, torch.finfo(pages.keys_XPGK.dtype).max, joined_TJ.stride(0), cos_TR.stride(0),
        *_strides(pages), *tile.strides, pages.tables_BY.stride(0), N,
        HEADS=N // G, TILE_ROWS=tile.rows, ROW_TILES=tile.num_tiles, SEQUENCES=triton.next_power_of_2(B),
        TOKENS=triton.next_power_of_2(longest_query), HAS_SINK=sink_N is not None, **_dims(fresh, pages),
        **{**tile.constants, "maxnreg": None, "num_stages": 2},
    )  # fmt: skip
    return out_TNV


def rotate_and_store(fresh: FreshHeads, pages: Pages, page_T: torch.Tensor, slot_T: torch.Tensor) -> torch.Tensor:
    """Write keys and values to the pages, and return the rotated queries [T, N, K]."""
    joined_TJ, N, G, K = fresh.joined_TJ, fresh.num_heads, fresh.num_kv_heads, fresh.key_dim
    cos_TR, sin_TR = _tables(fresh)
    T = joined_TJ.shape[0]
    q_TNK = joined_TJ.new_empty(T, N, K)
    _rotate_and_store[(T, triton.cdiv(N + G, _HEADS))](
        joined_TJ, cos_TR, sin_TR, q_TNK, pages.keys_XPGK, pages.values_XPGV, page_T, slot_T,
        fresh.value_scale, torch.finfo(pages.keys_XPGK.dtype).max, joined_TJ.stride(0), cos_TR.stride(0),
        *_strides(pages), N, G, BLOCK_HEADS=_HEADS, GROUPS_PAD=triton.next_power_of_2(G), **_dims(fresh, pages),
    )  # fmt: skip
    return q_TNK


def _tables(fresh: FreshHeads) -> tuple[torch.Tensor, torch.Tensor]:
    assert fresh.cos_TR is not None and fresh.sin_TR is not None, "heads without rotation are refused"
    return fresh.cos_TR, fresh.sin_TR


def _strides(pages: Pages) -> tuple[int, ...]:
    keys, values = pages.keys_XPGK, pages.values_XPGV
    return (*keys.stride()[:3], *values.stride()[:3])


def _dims(fresh: FreshHeads, pages: Pages) -> dict[str, int | bool]:
    K, V = fresh.key_dim, fresh.value_dim
    return dict(
        K=K, K_PAD=triton.next_power_of_2(K), V=V, V_PAD=triton.next_power_of_2(V),
        HALF=_tables(fresh)[0].shape[1] // 2,
        SATURATES=torch.finfo(pages.keys_XPGK.dtype).max < torch.finfo(fresh.joined_TJ.dtype).max,
    )  # fmt: skip


@triton.jit
def _store_rows(rows, numbers, is_row, dims, NUM_DIMS: tl.constexpr, limit, SATURATES: tl.constexpr):
    """Store a tile in the dtype of the cache, clamped to its largest number."""
    if SATURATES:
        numbers = tl.minimum(tl.maximum(numbers.to(tl.float32), -limit), limit)
    mask = is_row[:, None] & (dims < NUM_DIMS)[None, :]
    tl.store(rows[:, None] + dims[None, :], numbers.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _update_window(
    joined, cos, sin, new_keys, new_values, keys, values, tables, page_T, slot_T, query_lengths, key_lengths, sink, out,
    scale, window, value_scale, limit, stride_t, stride_table,
    new_kx, new_kp, new_kg, new_vx, new_vp, new_vg,
    stride_kx, stride_kp, stride_kg, stride_vx, stride_vp, stride_vg, stride_tb, num_heads,
    HEADS: tl.constexpr, TILE_ROWS: tl.constexpr, ROW_TILES: tl.constexpr, SEQUENCES: tl.constexpr,
    TOKENS: tl.constexpr, HAS_SINK: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr,
    V_PAD: tl.constexpr, HALF: tl.constexpr, SATURATES: tl.constexpr, KEY_DIM: tl.constexpr, FIRST_DIMS: tl.constexpr,
    REST_DIMS: tl.constexpr, REST_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, BLOCK: tl.constexpr, IS_PAIRED: tl.constexpr, KEY_AXIS: tl.constexpr,
    IN_ASSEMBLY: tl.constexpr, IN_QUADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, row_tile = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES
    b = tl.program_id(1)
    first_query, num_queries, num_keys = span(query_lengths, key_lengths, b, SEQUENCES)
    if row_tile * TILE_ROWS < num_queries * HEADS:
        # the programs of a head's row tiles write equal numbers
        new = tl.arange(0, TOKENS)
        token = (first_query + new).to(tl.int64)
        page = tl.load(page_T + token, mask=new < num_queries, other=-1)
        slot = tl.load(slot_T + token, mask=new < num_queries, other=0)
        num_groups = num_heads // HEADS
        key_rows = joined + (token * stride_t + (num_heads + group) * K)[:, None]
        tables_T = (token * stride_table)[:, None]
        dims, v_dims = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
        k = rotated(key_rows, cos + tables_T, sin + tables_T, page >= 0, dims, K, HALF, joined.dtype.element_ty)
        places = new_keys + page * new_kx + slot * new_kp + group * new_kg
        _store_rows(places, k, page >= 0, dims, K, limit, SATURATES)
        value_rows = joined + token * stride_t + (num_heads + num_groups) * K + group * V
        mask = (page >= 0)[:, None] & (v_dims < V)[None, :]
        v = tl.load(value_rows[:, None] + v_dims[None, :], mask=mask, other=0.0)
        v = (v.to(tl.float32) * value_scale).to(v.dtype)
        _store_rows(
            new_values + page * new_vx + slot * new_vp + group * new_vg, v, page >= 0, v_dims, V, limit, SATURATES
        )
        tl.debug_barrier()
        lowest = tl.maximum(num_keys - num_queries - window + 1, 0)
        rows = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        query, head = rows // HEADS, group * HEADS + rows % HEADS
        is_row = query < num_queries
        q_token = (first_query + query).to(tl.int64)
        tables_R = (q_token * stride_table)[:, None]
        q_first, q_rest, q_first_odd, q_rest_odd, factor = query_tile(
            joined + (q_token * stride_t + head * K)[:, None], cos + tables_R, sin + tables_R, is_row, scale, KEY_DIM,
            FIRST_DIMS, REST_DIMS, REST_PAD, TILE_ROWS, HALF, IS_PAIRED, IN_QUADS,
            joined.dtype.element_ty,
        )  # fmt: skip
        largest, total, sum_values = walk(
            q_first, q_rest, q_first_odd, q_rest_odd, factor, num_keys - num_queries + query,
            keys + group * stride_kg, values + group * stride_vg, tables + b * stride_tb, lowest // BLOCK * BLOCK,
            num_keys, lowest, window, stride_kx, stride_kp, stride_vx, stride_vp, KEY_DIM, FIRST_DIMS, REST_DIMS,
            REST_PAD, VALUE_DIM, VALUE_PAD, PAGE, PAGES, BLOCK, TILE_ROWS, True, IS_PAIRED, KEY_AXIS, IN_ASSEMBLY,
            IN_QUADS, PRECISION,
        )  # fmt: skip
        DIMS: tl.constexpr = VALUE_PAD * 2 if IS_PAIRED else VALUE_PAD
        store_result(out, sink, largest, total, sum_values, q_token, head, is_row, num_heads, V, DIMS, HAS_SINK)


@triton.jit
def _rotate_and_store(
    joined, cos, sin, q, keys, values, page_T, slot_T, value_scale, limit, stride_t, stride_table,
    stride_kx, stride_kp, stride_kg, stride_vx, stride_vp, stride_vg, num_heads, num_groups,
    BLOCK_HEADS: tl.constexpr, GROUPS_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, V: tl.constexpr,
    V_PAD: tl.constexpr, HALF: tl.constexpr, SATURATES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    page, slot = tl.load(page_T + token), tl.load(slot_T + token)
    dims = tl.arange(0, K_PAD)
    own = joined + token * stride_t
    table = (heads * 0)[:, None] + token * stride_table
    numbers = rotated(
        own + (heads * K)[:, None], cos + table, sin + table, heads < num_heads + num_groups, dims, K, HALF,
        joined.dtype.element_ty,
    )  # fmt: skip
    is_dim = (dims < K)[None, :]
    place = (token * num_heads + heads)[:, None] * K + dims[None, :]
    tl.store(q + place, numbers, mask=(heads < num_heads)[:, None] & is_dim)
    if page >= 0:
        group = heads - num_heads
        is_key = (group >= 0) & (group < num_groups)
        _store_rows(
            keys + page * stride_kx + slot * stride_kp + group * stride_kg, numbers, is_key, dims, K, limit, SATURATES
        )
        if tl.program_id(1) == 0:
            own_group = tl.arange(0, GROUPS_PAD)
            v_dims = tl.arange(0, V_PAD)
            mask = (own_group < num_groups)[:, None] & (v_dims < V)[None, :]
            rows = own + ((num_heads + num_groups) * K + own_group * V)[:, None]
            v = tl.load(rows + v_dims[None, :], mask=mask, other=0.0)
            v = (v.to(tl.float32) * value_scale).to(v.dtype)
            _store_rows(
                values + page * stride_vx + slot * stride_vp + own_group * stride_vg, v, own_group < num_groups,
                v_dims, V, limit, SATURATES,
            )  # fmt: skip
