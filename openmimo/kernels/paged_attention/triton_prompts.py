"""Prompts on an accelerator whose keys are all in the pages: one kernel, whose grid no length on the device changes.

So a captured graph can read prompts, and a chunk needs no copy of the keys before it.
"""

import torch

from openmimo.kernels.attention import AttentionOut, ChosenBlocks, PagedNeed, Pages
from openmimo.kernels.attention._calls import refuse_blocks
from openmimo.kernels.dispatch import Backend, triton_unavailable

_MAX_DIMS = 256  # of a key or a value


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
    from openmimo.kernels.attention._triton_prompts import attend_tiles

    assert score_block is None, "refused"
    out_TNV = attend_tiles(
        q_TNK,
        pages.keys_XPGK,
        pages.values_XPGV,
        pages.tables_BY,
        sink_N,
        query_lengths_B,
        key_lengths_B,
        longest_query=longest_query,
        scale=q_TNK.shape[2] ** -0.5,
        window_keys=window_keys,
    )
    return AttentionOut(out_TNV)


def refuse(need: PagedNeed) -> str | None:
    """Refuse training, block scores, chosen blocks, large heads, and a cache in another dtype."""
    if reason := refuse_blocks(need):
        return reason
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients:
        return "it has no backward pass"
    if need.cache_dtype != need.dtype:
        return f"the cache is {need.cache_dtype} and the queries are {need.dtype}"
    if max(need.key_dim, need.value_dim) > _MAX_DIMS:
        return f"its heads have up to {_MAX_DIMS} dims"
    return None


PLUGIN = Backend(priority=60, run=run, refuse=refuse)
