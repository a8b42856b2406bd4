"""Many queries on a CPU, forward only: full attention and windows, packed or after a cache (native/causal.c).

Products are those of float32, also of bfloat16 numbers, where the processor does not multiply these itself.

A row of the output does not depend on what else the call computes, to the bit.
"""

import functools
import struct

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import NO_SCORES, AttentionNeed, AttentionOut
from openmimo.kernels.dispatch import Backend
from openmimo.runtime.device import cpu_multiplies_bfloat16

FEW_QUERIES = 16  # which `packed_rows` serves
NO_WINDOW = 1 << 62
_CALL = struct.Struct("5P8qd")  # `causal_call` of native/causal.c


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> AttentionOut:
    """See `openmimo.kernels.attention.attend`. Raises MemoryError where the keys cannot be laid out."""
    q_TNK, k_SGK, v_SGV = q_TNK.contiguous(), k_SGK.contiguous(), v_SGV.contiguous()
    out_TNV = q_TNK.new_empty(*q_TNK.shape[:2], v_SGV.shape[2])
    if sink_N is not None:
        sink_N = sink_N.to(torch.float32).contiguous()
    num_sequences = len(need.query_lengths)
    lengths = struct.pack(f"{2 * num_sequences}q", *need.query_lengths, *need.key_lengths)
    call = _CALL.pack(
        q_TNK.data_ptr(),
        k_SGK.data_ptr(),
        v_SGV.data_ptr(),
        0 if sink_N is None else sink_N.data_ptr(),
        out_TNV.data_ptr(),
        *(num_sequences, need.num_heads, need.num_kv_heads, need.key_dim, need.value_dim),
        *(need.window_keys or NO_WINDOW, torch.get_num_threads(), q_TNK.dtype == torch.bfloat16, scale),
    )
    if _entry()(call, lengths):
        raise MemoryError(f"there is no memory to lay out {sum(need.key_lengths):,} keys for attention")
    return AttentionOut(out_TNV)


@functools.cache
def _entry() -> native.Entry:
    return native.entry("openmimo_causal_attention", arguments=2)


def refuse(need: AttentionNeed) -> str | None:
    """More than a few queries on a CPU, without gradients; in bfloat16 only where torch would be slow."""
    if need.score_block is not None:
        return NO_SCORES
    if not need.on_cpu:
        return "it is for CPUs"
    if need.needs_gradients:
        return "it has no backward pass"
    if need.dtype not in native.DTYPES:
        return f"it computes float32 and bfloat16, not {need.dtype}"
    if need.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        return "this CPU multiplies bfloat16 itself"
    if max(need.query_lengths, default=0) <= FEW_QUERIES:
        return f"with at most {FEW_QUERIES} queries a sequence, laying out the keys costs more than it saves"
    if native.library() is None:
        return "the native library is not there"
    return None


PLUGIN = Backend(rank=0, run=run, refuse=refuse)
