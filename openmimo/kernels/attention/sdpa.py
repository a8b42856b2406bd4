"""Full causal attention on an accelerator through torch's own kernels: cuDNN first, which takes unequal key and value
dims and grouped heads as they are.

T queries, N query heads, G key/value heads, K key dim, V value dim.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from openmimo.kernels.attention import AttentionNeed
from openmimo.kernels.dispatch import Backend

_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> torch.Tensor:
    """See `openmimo.kernels.attention.attend`. Documents of one length are one batch, others follow one another."""
    lengths = need.query_lengths
    if len(set(lengths)) == 1:
        return _batch(q_TNK, k_SGK, v_SGV, len(lengths), scale)
    parts = zip(q_TNK.split(lengths), k_SGK.split(lengths), v_SGV.split(lengths), strict=True)
    return torch.cat([_batch(q, k, v, 1, scale) for q, k, v in parts])


def refuse(need: AttentionNeed) -> str | None:
    """An accelerator's half precision, full layers without a sink, no cached prefix."""
    if need.on_cpu:
        return "on a CPU torch computes unequal key and value dims by the slow path"
    if need.window_keys is not None:
        return "torch's kernels take no window"
    if need.has_sink:
        return "torch's kernels take no sink"
    if not need.is_self_attention:
        return "torch aligns causal masks at the first key, not at the last"
    if need.dtype not in (torch.bfloat16, torch.float16):
        return "torch's fast kernels compute in half precision only"
    return None


def _batch(q_TNK: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor, num_documents: int, scale: float) -> torch.Tensor:
    q, k, v = (x.unflatten(0, (num_documents, -1)).transpose(1, 2) for x in (q_TNK, k_TGK, v_TGV))
    with sdpa_kernel(_KERNELS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


PLUGIN = Backend(rank=5, run=run, refuse=refuse)
