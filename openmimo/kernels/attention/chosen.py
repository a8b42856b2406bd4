"""Queries that read chosen blocks of keys, on a CPU, forward only: the blocks are read in place (native/attention.c).

The pack is one page, from whose beginning the blocks of every sequence are addressed. A query reads the keys of its
blocks only, while `blocked` computes the logits of all keys.

Batch invariance: a row of the output has the same bits in every call that computes it, paged calls included.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import AttentionNeed, AttentionOut, ChosenBlocks
from openmimo.kernels.attention._calls import attend_chosen, refuse_paged_dims
from openmimo.kernels.dispatch import Backend


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
    blocks: ChosenBlocks,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.attend`."""
    k_SGK, v_SGV = k_SGK.contiguous(), v_SGV.contiguous()
    query_lengths, key_lengths = torch.tensor(need.query_lengths), torch.tensor(need.key_lengths)
    starts_T = (key_lengths.cumsum(0) - key_lengths).repeat_interleave(query_lengths)
    first_T = (query_lengths.cumsum(0) - key_lengths).repeat_interleave(query_lengths)
    out_TNV = attend_chosen(
        q_TNK,
        k_SGK[None],
        v_SGV[None],
        sink_N,
        blocks,
        own_T=torch.arange(len(q_TNK)) - first_T,
        run_positions=blocks.size,
        entries=lambda rows, position_TGY: (position_TGY + starts_T[rows, None, None]).int(),
        scale=scale,
    )
    return AttentionOut(out_TNV)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse calls without chosen blocks, gradients, accelerators, and other dims than those of the kernel."""
    if need.chosen_block is None:
        return "it reads chosen blocks only"
    return refuse_paged_dims(need) or native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
