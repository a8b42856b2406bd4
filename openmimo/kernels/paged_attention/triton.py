"""Decoding and verification on an accelerator: one pass over the pages, which holds the query rows of a head group.

T queries, N query heads, G key/value heads, K key dim, V value dim, B sequences.
"""

import torch

from openmimo.kernels.attention import NO_SCORES, AttentionOut, ChosenBlocks, PagedNeed, Pages
from openmimo.kernels.dispatch import Backend, triton_unavailable

_CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_MAX_QUERIES = 16
_SCORE_BLOCK = 64  # keys of a tile of the kernel


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

    if blocks is not None:
        return AttentionOut(_attend_chosen(q_TNK, pages, sink_N, blocks, query_lengths_B, key_lengths_B))
    out_TNV, scores_BGCQ = attend_pages(
        q_TNK, pages, sink_N, query_lengths_B, key_lengths_B,
        longest_query=longest_query, longest_key=longest_key, window_keys=window_keys, scores=score_block is not None,
    )  # fmt: skip
    if scores_BGCQ is None:
        return AttentionOut(out_TNV)
    sequence_T, index_T, _ = _places(len(q_TNK), query_lengths_B, key_lengths_B)
    return AttentionOut(out_TNV, scores_BGCQ[sequence_T, :, :, index_T])


def _places(
    num_queries: int, query_lengths_B: torch.Tensor, key_lengths_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sequence of each query, its index among those of the sequence, and its position; int64 [T] each."""
    sequences_B = torch.arange(len(query_lengths_B), device=query_lengths_B.device)
    sequence_T = sequences_B.repeat_interleave(query_lengths_B, output_size=num_queries)
    first_B = query_lengths_B.cumsum(0) - query_lengths_B
    index_T = torch.arange(num_queries, device=sequence_T.device) - first_B[sequence_T]
    return sequence_T, index_T, (key_lengths_B - query_lengths_B)[sequence_T] + index_T


def _attend_chosen(
    q_TNK: torch.Tensor,
    pages: Pages,
    sink_N: torch.Tensor | None,
    blocks: ChosenBlocks,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
) -> torch.Tensor:
    """Read chosen blocks as pages: each query is a sequence, whose table has the pages of its blocks.

    Key/value heads choose different blocks, and each is a call of its own.
    """
    from openmimo.kernels.paged_attention._triton import attend_pages

    T, N, _ = q_TNK.shape
    P, G = pages.keys_XPGK.shape[1:3]
    J, size = blocks.ids_TGJ.shape[2], blocks.size
    sequence_T, _, own_T = _places(T, query_lengths_B, key_lengths_B)
    own_T11 = own_T[:, None, None]
    seen_TG = ((own_T11 + 1 - blocks.ids_TGJ * size).clamp(max=size) * (blocks.ids_TGJ >= 0)).sum(2).int()
    runs = torch.arange(size // P, device=own_T.device)
    page_TGY = (blocks.ids_TGJ[..., None] * (size // P) + runs).flatten(2).clamp(min=0)
    tables_TGY = pages.tables_BY[sequence_T[:, None, None], torch.minimum(page_TGY, own_T11 // P)].int()
    ones_T = torch.ones(T, dtype=torch.int32, device=own_T.device)
    outputs = []
    for group, heads in enumerate(torch.arange(N).chunk(G)):
        rows = slice(int(heads[0]), int(heads[-1]) + 1)
        kv = slice(group, group + 1)
        own_pages = Pages(pages.keys_XPGK[:, :, kv], pages.values_XPGV[:, :, kv], tables_TGY[:, group].contiguous())
        out_TRV, _ = attend_pages(
            q_TNK[:, rows], own_pages, None if sink_N is None else sink_N[rows], ones_T, seen_TG[:, group].contiguous(),
            longest_query=1, longest_key=J * size, window_keys=None,
        )  # fmt: skip
        outputs.append(out_TRV)
    return torch.cat(outputs, dim=1)


def refuse(need: PagedNeed) -> str | None:
    """Few queries per sequence, in the floating-point formats of the kernel, without gradients."""
    if need.score_block not in (None, _SCORE_BLOCK):
        return f"{NO_SCORES} except of blocks of {_SCORE_BLOCK} keys"
    if need.chosen_block is not None and (need.page_positions == 0 or need.chosen_block % need.page_positions):
        return f"it reads chosen blocks of whole pages, not of {need.chosen_block} keys"
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
