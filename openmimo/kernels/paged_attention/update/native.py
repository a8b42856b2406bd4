"""Decoding and verification on a CPU: one call rotates, scales, stores and attends (native/attention.c).

Batch invariance: a row of the output has the same bits in every call that computes it.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import NO_SCORES, AttentionOut, FreshHeads, Pages, UpdateNeed
from openmimo.kernels.attention._calls import (
    MAX_DECODE_QUERIES,
    NO_WINDOW,
    address,
    float32_sink,
    position_strides,
    refuse_paged_dims,
)
from openmimo.kernels.dispatch import Backend

_UPDATE = native.Function("openmimo_update_and_attend", "12P17qd")  # `update_call` of native/attention.c


def run(
    fresh: FreshHeads,
    pages: Pages,
    page_T: torch.Tensor,
    slot_T: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    longest_query: int,
    longest_key: int,
    window_keys: int | None,
    score_block: int | None = None,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.update_and_attend`.

    Raises:
        MemoryError: There is no memory for the rotated queries.
        ValueError: The numbers of a cache position are not contiguous.
    """
    joined, N, G, K, V, cos, sin, value_scale = fresh
    keys, values, tables = pages
    assert score_block is None and cos is not None and sin is not None, "refused"
    T, sink_N = joined.shape[0], float32_sink(sink_N)
    tables = tables if tables.stride(1) == 1 else tables.contiguous()
    assert query_lengths_B.is_contiguous() and key_lengths_B.is_contiguous()
    assert page_T.is_contiguous() and slot_T.is_contiguous()
    out_TNV = joined.new_empty(T, N, V)
    call = _UPDATE.pack(
        joined.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        page_T.data_ptr(),
        slot_T.data_ptr(),
        address(sink_N),
        out_TNV.data_ptr(),
        tables.data_ptr(),
        query_lengths_B.data_ptr(),
        key_lengths_B.data_ptr(),
        *(T, joined.stride(0), cos.shape[1], query_lengths_B.shape[0], N, G, K, V, keys.shape[1]),
        *(*position_strides(keys), *position_strides(values), tables.stride(0)),
        *(window_keys or NO_WINDOW, torch.get_num_threads(), joined.dtype == torch.bfloat16, value_scale),
    )
    if _UPDATE.call(call):
        raise MemoryError(f"there is no memory for the queries of {T:,} tokens")
    return AttentionOut(out_TNV)


def refuse(need: UpdateNeed) -> str | None:
    """Refuse all but few queries per sequence on a CPU, of whole vectors and the dtype of the cache."""
    if need.score_block is not None:
        return NO_SCORES
    if need.longest_query > MAX_DECODE_QUERIES:
        return f"it takes at most {MAX_DECODE_QUERIES} queries a sequence, not {need.longest_query}"
    if need.cache_dtype != need.dtype:
        return f"the heads are {need.dtype} and the cache {need.cache_dtype}"
    if not need.readable:
        return "heads are not rotated, or heads, tables or pages are not contiguous or differ in dtype"
    return refuse_paged_dims(need) or native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
