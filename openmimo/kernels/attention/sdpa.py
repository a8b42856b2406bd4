"""Full causal attention through `F.scaled_dot_product_attention`: accelerators only, cuDNN before flash.

On the CPU that call multiplies out T x T numbers when key and value dims differ, so it is refused there.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from openmimo.kernels.attention import AttentionNeed
from openmimo.kernels.dispatch import Backend

PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> torch.Tensor:
    """See `openmimo.kernels.attention.attend`. Sequences of one length are a batch; others go one after another."""
    lengths = need.query_lengths
    if len(set(lengths)) == 1:
        return _batch(q_TNK, k_SGK, v_SGV, len(lengths), scale)
    parts = zip(q_TNK.split(lengths), k_SGK.split(lengths), v_SGV.split(lengths), strict=True)
    return torch.cat([_batch(q, k, v, 1, scale) for q, k, v in parts])


def refuse(need: AttentionNeed) -> str | None:
    """Self-attention in half precision on an accelerator, no window, no sink."""
    if need.on_cpu:
        return "it is for accelerators"
    if need.window_keys is not None or need.has_sink:
        return "the torch call has neither windows nor sinks"
    if not need.is_self_attention:
        return "its causal mask is for sequences with as many queries as keys"
    if need.dtype not in (torch.bfloat16, torch.float16):
        return f"its fast kernels are for half precision, not {need.dtype}"
    return None


def _batch(
    q_TNK: torch.Tensor, k_SGK: torch.Tensor, v_SGV: torch.Tensor, num_sequences: int, scale: float
) -> torch.Tensor:
    q, k, v = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q_TNK, k_SGK, v_SGV))
    with sdpa_kernel(PREFERRED, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


PLUGIN = Backend(rank=1, run=run, refuse=refuse)
