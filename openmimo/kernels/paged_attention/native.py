"""Decoding and verification on a CPU: pages are read in place, and the whole batch is one call (native/attention.c).

Batch invariance: a row of the output has the same bits in every call that computes it.
"""

import math

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import AttentionOut, ChosenBlocks, PagedNeed, Pages
from openmimo.kernels.attention._calls import MAX_DECODE_QUERIES, attend_chosen, call_paged_kernel, refuse_paged_dims
from openmimo.kernels.dispatch import Backend


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
    if blocks is not None:
        return AttentionOut(_attend_chosen(q_TNK, pages, sink_N, blocks, query_lengths_B, key_lengths_B))
    out_TNV, scores_TGC = call_paged_kernel(
        q_TNK,
        pages,
        sink_N,
        query_lengths_B,
        key_lengths_B,
        run_positions=pages.keys_XPGK.shape[1],
        window_keys=window_keys,
        score_block=score_block,
        longest_key=longest_key,
    )
    return AttentionOut(out_TNV, scores_TGC)


def _attend_chosen(
    q_TNK: torch.Tensor,
    pages: Pages,
    sink_N: torch.Tensor | None,
    blocks: ChosenBlocks,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
) -> torch.Tensor:
    """A paged read of the chosen blocks; a block, or a part of one, is contiguous in a page."""
    P = pages.keys_XPGK.shape[1]
    sequence_T = torch.arange(len(query_lengths_B)).repeat_interleave(query_lengths_B)
    first_T = (query_lengths_B.cumsum(0) - key_lengths_B)[sequence_T]

    def entries(rows: slice, position_TGY: torch.Tensor) -> torch.Tensor:
        pages_TGY = pages.tables_BY[sequence_T[rows, None, None], position_TGY // P]
        return (pages_TGY * P + position_TGY % P).int()

    return attend_chosen(
        q_TNK,
        pages.keys_XPGK,
        pages.values_XPGV,
        sink_N,
        blocks,
        own_T=torch.arange(len(q_TNK)) - first_T,
        run_positions=math.gcd(blocks.size, P),
        entries=entries,
    )


def refuse(need: PagedNeed) -> str | None:
    """Refuse all but few queries per sequence on a CPU, of whole vectors and the cache's dtype or an int8 cache."""
    if need.longest_query > MAX_DECODE_QUERIES:
        return f"it takes at most {MAX_DECODE_QUERIES} queries a sequence, not {need.longest_query}"
    if need.cache_dtype not in (need.dtype, torch.int8):
        return f"the queries are {need.dtype} and the cache {need.cache_dtype}"
    return refuse_paged_dims(need) or native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
