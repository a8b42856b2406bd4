"""The definition: rotation, value scale, store and attention, each by its own fastest backend."""

import torch

from openmimo.kernels.attention import AttentionOut, FreshHeads, Pages, paged_attend, rotated_heads, store
from openmimo.kernels.dispatch import Backend


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
    """Implement `openmimo.kernels.attention.update_and_attend`."""
    q_TNK, k_TGK, v_TGV = rotated_heads(fresh)
    store(pages, page_T, slot_T, k_TGK, v_TGV)
    return paged_attend(
        q_TNK,
        pages,
        sink_N,
        query_lengths_B=query_lengths_B,
        key_lengths_B=key_lengths_B,
        longest_query=longest_query,
        longest_key=longest_key,
        window_keys=window_keys,
        score_block=score_block,
    )


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
