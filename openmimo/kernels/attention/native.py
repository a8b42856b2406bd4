"""Many queries on a CPU, forward only: full attention and windows, packed or after a cache (native/causal.c).

Products are computed in float32. For bfloat16 inputs this pays only on a processor without bfloat16 instructions.

Batch invariance: a row of the output has the same bits in every call that computes it.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import CAUSAL_ONLY, NO_BLOCKS, NO_SCORES, AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import MAX_DECODE_QUERIES, call_causal_kernel
from openmimo.kernels.dispatch import Backend
from openmimo.runtime.device import cpu_multiplies_bfloat16

_MAX_ROWS = 96  # of native/causal.c


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.attend`.

    Raises:
        MemoryError: There is no memory for the kernel's layout of the keys.
    """
    return call_causal_kernel(q_TNK, k_SGK, v_SGV, sink_N, need, scale)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse decoding, gradients, accelerators, and bfloat16 on a CPU that multiplies it."""
    if need.chosen_block is not None:
        return NO_BLOCKS
    heads = need.num_heads // need.num_kv_heads
    if need.score_block is not None and (need.window_keys is not None or heads > _MAX_ROWS):
        return f"{NO_SCORES} of a window, or of more than {_MAX_ROWS} query heads of a key/value head"
    if not need.causal:
        return CAUSAL_ONLY
    if need.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        return "this CPU multiplies bfloat16 itself"
    if max(need.query_lengths, default=0) <= MAX_DECODE_QUERIES:
        return f"with at most {MAX_DECODE_QUERIES} queries a sequence, laying out the keys costs more than it saves"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
