"""The definition: rotation, value scale, store and attention, each by its own fastest backend."""

import torch

from openmimo.kernels.attention import AttentionOut, FreshHeads, Pages, paged_attend, store
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import apply_rotary


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


def rotated_heads(fresh: FreshHeads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated queries [T, N, K], rotated keys [T, G, K] and scaled values [T, G, V]. Differentiable."""
    T, N, G, K = len(fresh.joined_TJ), fresh.num_heads, fresh.num_kv_heads, fresh.key_dim
    queries_and_keys, values = fresh.joined_TJ.split_with_sizes([(N + G) * K, G * fresh.value_dim], dim=1)
    rotated = apply_rotary(queries_and_keys.view(T, N + G, K), fresh.cos_TR, fresh.sin_TR)
    q_TNK, k_TGK = rotated.split_with_sizes([N, G], dim=1)
    v_TGV = values.view(T, G, fresh.value_dim)
    return q_TNK, k_TGK, v_TGV if fresh.value_scale == 1.0 else v_TGV * fresh.value_scale


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
