"""Many queries on a CPU, forward only: full attention and windows, packed or after a cache (native/causal.c).

Products are computed in float32. For bfloat16 inputs this pays only on a processor without bfloat16 instructions.

Batch invariance: a row of the output has the same bits in every call that computes it.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import CAUSAL_ONLY, NO_BLOCKS, NO_SCORES, AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import (
    MAX_DECODE_QUERIES,
    NO_WINDOW,
    address,
    float32_sink,
    packed_lengths,
    zero_scores,
)
from openmimo.kernels.dispatch import Backend
from openmimo.runtime.device import cpu_multiplies_bfloat16

_MAX_ROWS = 96  # of native/causal.c
_CAUSAL = native.Function("openmimo_causal_attention", "6P10qd", num_arguments=2)  # `causal_call` of native/causal.c


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
    q_TNK, k_SGK, v_SGV = q_TNK.contiguous(), k_SGK.contiguous(), v_SGV.contiguous()
    out_TNV = q_TNK.new_empty(*q_TNK.shape[:2], v_SGV.shape[2])
    sink_N = float32_sink(sink_N)
    scores_TGC = zero_scores(q_TNK, need.num_kv_heads, need.score_block, max(need.key_lengths))
    call = _CAUSAL.pack(
        q_TNK.data_ptr(),
        k_SGK.data_ptr(),
        v_SGV.data_ptr(),
        address(sink_N),
        out_TNV.data_ptr(),
        address(scores_TGC),
        *(len(need.query_lengths), need.num_heads, need.num_kv_heads, need.key_dim, need.value_dim),
        *(need.window_keys or NO_WINDOW, torch.get_num_threads(), q_TNK.dtype == torch.bfloat16),
        *(need.score_block or 1, 1 if scores_TGC is None else scores_TGC.shape[2], scale),
    )
    if _CAUSAL.call(call, packed_lengths(need.query_lengths, need.key_lengths)):
        raise MemoryError(f"there is no memory to lay out {sum(need.key_lengths):,} keys for attention")
    return AttentionOut(out_TNV, scores_TGC)


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
