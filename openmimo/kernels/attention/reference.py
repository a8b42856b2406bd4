"""The definition: a dense masked softmax per sequence, in float32 or better. Refuses nothing; costs T x S memory.

T queries, S keys, N query heads, G key/value heads, R = N / G, K key dim, V value dim.
"""

import torch

from openmimo.kernels.attention import AttentionNeed
from openmimo.kernels.dispatch import Backend


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> torch.Tensor:
    """See `openmimo.kernels.attention.attend`."""
    queries = q_TNK.split(need.query_lengths)
    keys = k_SGK.split(need.key_lengths)
    values = v_SGV.split(need.key_lengths)
    outputs = [
        _one_sequence(q, k, v, sink_N, need.window_keys, scale) for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs)


def _one_sequence(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    window_keys: int | None,
    scale: float,
) -> torch.Tensor:
    T, N, _ = q_TNK.shape
    S, G, _ = k_SGK.shape
    dtype = torch.float64 if q_TNK.dtype == torch.float64 else torch.float32
    k_SNK = k_SGK.repeat_interleave(N // G, dim=1).to(dtype)
    v_SNV = v_SGV.repeat_interleave(N // G, dim=1).to(dtype)
    logits_NTS = torch.einsum("tnk,snk->nts", q_TNK.to(dtype), k_SNK) * scale
    distance_TS = torch.arange(S - T, S, device=q_TNK.device)[:, None] - torch.arange(S, device=q_TNK.device)[None, :]
    hidden_TS = distance_TS < 0
    if window_keys is not None:
        hidden_TS = hidden_TS | (distance_TS >= window_keys)
    logits_NTS = logits_NTS.masked_fill(hidden_TS, float("-inf"))
    if sink_N is not None:
        sink_NT1 = sink_N.to(dtype)[:, None, None].expand(N, T, 1)
        logits_NTS = torch.cat([logits_NTS, sink_NT1], dim=-1)
    probabilities_NTS = logits_NTS.softmax(dim=-1)[..., :S]
    return torch.einsum("nts,snv->tnv", probabilities_NTS, v_SNV).to(q_TNK.dtype)


PLUGIN = Backend(rank=1000, run=run, refuse=lambda need: None)
