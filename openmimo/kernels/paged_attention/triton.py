"""Decoding and verification on an accelerator: one pass over the pages, which holds the query rows of a head group.

T queries, N query heads, G key/value heads, K key dim, V value dim, B sequences.
"""

import torch

from openmimo.kernels.attention import AttentionOut, ChosenBlocks, PagedNeed, Pages
from openmimo.kernels.attention._calls import refuse_blocks
from openmimo.kernels.dispatch import Backend, triton_unavailable

_CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_MAX_QUERIES = 16


def run(
    q_TNK: torch.Tensor,
    pages: Pages,
    sink_N: torch.Tensor | None,
    *,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    longest_query: int,
    longest_key: int,
    window_keys: int | None,
    score_block: int | None = None,
    blocks: ChosenBlocks | None = None,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.paged_attend`."""
    from openmimo.kernels.paged_attention._triton import attend_pages

    assert score_block is None and blocks is None, "refused"
    return AttentionOut(
        attend_pages(
            q_TNK, pages, sink_N, query_lengths_B, key_lengths_B,
            longest_query=longest_query, longest_key=longest_key, window_keys=window_keys,
        )
    )  # fmt: skip


def refuse(need: PagedNeed) -> str | None:
    """Few queries per sequence, in the floating-point formats of the kernel, without gradients."""
    if reason := refuse_blocks(need):
        return reason
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients:
        return "it has no backward pass"
    if need.longest_query > _MAX_QUERIES:
        return f"it takes up to {_MAX_QUERIES} queries per sequence, not {need.longest_query}"
    if need.cache_dtype not in _CACHE_DTYPES:
        return f"it does not read {need.cache_dtype}"
    return None


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
