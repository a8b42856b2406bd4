"""Attention of packs with gradients on an accelerator: windows, sinks and full layers. Not yet run on a GPU.

It is used only where OPENMIMO_ATTENTION=triton_training asks for it: its priority is below that of `blocked`, which
serves every causal call.
"""

import torch

from openmimo.kernels.attention import CAUSAL_ONLY, AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import refuse_blocks
from openmimo.kernels.dispatch import Backend, triton_unavailable

_MAX_KEY_DIM, _MAX_VALUE_DIM = 192, 128  # the sums of a block of keys fill the registers
_MAX_HEADS = 128  # query heads of a key/value head


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.attend`."""
    from openmimo.kernels.attention._training import attend_pack, documents_of

    documents = documents_of(need.query_lengths, q_TNK.device)
    out_TNV = attend_pack(q_TNK, k_SGK, v_SGV, sink_N, documents, scale=scale, window_keys=need.window_keys)
    return AttentionOut(out_TNV)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse block scores, chosen blocks, cached keys, attention to later keys, and large heads."""
    if reason := refuse_blocks(need):
        return reason
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.dtype == torch.float32 and not need.on_cpu:
        return "on an accelerator it computes half precision only"  # without tensor cores, compilation takes minutes
    if not need.is_self_attention:
        return "a sequence has more keys than queries"
    if not need.causal:
        return CAUSAL_ONLY
    if need.key_dim > _MAX_KEY_DIM or need.value_dim > _MAX_VALUE_DIM:
        return f"its keys have up to {_MAX_KEY_DIM} dims and its values up to {_MAX_VALUE_DIM}"
    if need.num_heads // need.num_kv_heads > _MAX_HEADS:
        return f"it takes up to {_MAX_HEADS} query heads of a key/value head"
    return None


PLUGIN = Backend(priority=10, run=run, refuse=refuse)
