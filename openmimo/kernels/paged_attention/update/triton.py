"""Decoding and verification on an accelerator: one kernel for a layer with a window, two and a sum for other layers."""

import torch

from openmimo.kernels.attention import NO_SCORES, AttentionOut, FreshHeads, Pages, UpdateNeed
from openmimo.kernels.dispatch import Backend, triton_unavailable

_CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_MAX_QUERIES = 16


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
    """Implement `openmimo.kernels.attention.update_and_attend`. A token whose page is -1 is not written."""
    from openmimo.kernels.paged_attention._triton import attend_pages, is_one_part
    from openmimo.kernels.paged_attention.update._triton import rotate_and_store, update_window

    assert score_block is None, "refused"
    if is_one_part(window_keys):
        assert window_keys is not None
        return AttentionOut(
            update_window(
                fresh, pages, page_T, slot_T, sink_N, query_lengths_B, key_lengths_B,
                longest_query=longest_query, window_keys=window_keys,
            )
        )  # fmt: skip
    q_TNK = rotate_and_store(fresh, pages, page_T, slot_T)
    return AttentionOut(
        attend_pages(
            q_TNK, pages, sink_N, query_lengths_B, key_lengths_B,
            longest_query=longest_query, longest_key=longest_key, window_keys=window_keys,
        )
    )  # fmt: skip


def refuse(need: UpdateNeed) -> str | None:
    """Few queries per sequence, in the floating-point formats of the kernels, without gradients."""
    if need.score_block is not None:
        return NO_SCORES
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients:
        return "it has no backward pass"
    if need.longest_query > _MAX_QUERIES:
        return f"it takes up to {_MAX_QUERIES} queries per sequence, not {need.longest_query}"
    if need.cache_dtype not in _CACHE_DTYPES:
        return f"it does not write {need.cache_dtype}"
    return (
        None
        if need.readable
        else "heads are not rotated, or heads, tables or pages are not contiguous or differ in dtype"
    )


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
