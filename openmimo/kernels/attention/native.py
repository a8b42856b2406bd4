"""Many queries on a CPU, forward only: full attention and windows, packed or after a cache (native/causal.c).

Products are computed in float32. For bfloat16 inputs this pays only on a processor without bfloat16 instructions.

Batch invariance: a row of the output has the same bits in every call that computes it.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import CAUSAL_ONLY, AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import (
    MAX_DECODE_QUERIES,
    NO_WINDOW,
    float32_sink,
    packed_lengths,
    refuse_blocks,
)
from openmimo.kernels.dispatch import Backend
from openmimo.runtime.device import cpu_multiplies_bfloat16

_CAUSAL = native.Function("openmimo_causal_attention", "5P8qd", num_arguments=2)  # `causal_call` of native/causal.c


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
    call = _CAUSAL.pack(
        q_TNK.data_ptr(),
        k_SGK.data_ptr(),
        v_SGV.data_ptr(),
        0 if sink_N is None else sink_N.data_ptr(),
        out_TNV.data_ptr(),
        *(len(need.query_lengths), need.num_heads, need.num_kv_heads, need.key_dim, need.value_dim),
        *(need.window_keys or NO_WINDOW, torch.get_num_threads(), q_TNK.dtype == torch.bfloat16, scale),
    )
    if _CAUSAL.call(call, packed_lengths(need.query_lengths, need.key_lengths)):
        raise MemoryError(f"there is no memory to lay out {sum(need.key_lengths):,} keys for attention")
    return AttentionOut(out_TNV)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse decoding, gradients, accelerators, and bfloat16 on a CPU that multiplies it."""
    if reason := refuse_blocks(need):
        return reason
    if not need.causal:
        return CAUSAL_ONLY
    if need.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        return "this CPU multiplies bfloat16 itself"
    if max(need.query_lengths, default=0) <= MAX_DECODE_QUERIES:
        return f"with at most {MAX_DECODE_QUERIES} queries a sequence, laying out the keys costs more than it saves"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
