"""Decoding: a few queries a sequence against a cache, for inference only.

The R = N / G query heads and the few queries that share a key/value head are the rows of one matrix product with its
keys, so a cache is read once and never repeated.

T queries, S keys, N query heads, G key/value heads, R = N / G, K key dim, V value dim.
"""

import torch

from openmimo.kernels.attention import AttentionNeed
from openmimo.kernels.dispatch import Backend

_MOST_QUERIES = 16


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
    q_TNK = q_TNK * scale
    if len(need.query_lengths) == 1:
        return _one_sequence(q_TNK, k_SGK, v_SGV, sink_N, need.window_keys)
    queries, keys = q_TNK.split(need.query_lengths), k_SGK.split(need.key_lengths)
    values = v_SGV.split(need.key_lengths)
    return torch.cat(
        [_one_sequence(q, k, v, sink_N, need.window_keys) for q, k, v in zip(queries, keys, values, strict=True)]
    )


def refuse(need: AttentionNeed) -> str | None:
    """No gradients, and few queries."""
    if need.needs_gradients:
        return "it has no backward pass"
    if max(need.query_lengths) > _MOST_QUERIES:
        return f"it serves at most {_MOST_QUERIES} queries a sequence"
    return None


def _one_sequence(
    q_TNK: torch.Tensor, k_SGK: torch.Tensor, v_SGV: torch.Tensor, sink_N: torch.Tensor | None, window_keys: int | None
) -> torch.Tensor:
    T, N, K = q_TNK.shape
    S, G, V = v_SGV.shape
    rows_GMK = q_TNK.view(T, G, N // G, K).permute(1, 2, 0, 3).reshape(G, -1, K)
    logits_GMS = torch.matmul(rows_GMK, k_SGK.permute(1, 2, 0))
    if logits_GMS.dtype != torch.float64:
        logits_GMS = logits_GMS.float()
    if T > 1 or (window_keys is not None and S > window_keys):
        distance_TS = torch.arange(S - T, S, device=q_TNK.device)[:, None] - torch.arange(S, device=q_TNK.device)
        hidden_TS = distance_TS < 0
        if window_keys is not None:
            hidden_TS |= distance_TS >= window_keys
        logits_GMS.view(G, N // G, T, S).masked_fill_(hidden_TS, float("-inf"))
    if sink_N is not None:
        sink_GM1 = sink_N.to(logits_GMS.dtype).view(G, -1, 1).expand(G, N // G, T).reshape(G, -1, 1)
        logits_GMS = torch.cat([logits_GMS, sink_GM1], dim=-1)
    probabilities_GMS = logits_GMS.softmax(dim=-1)[..., :S].to(v_SGV.dtype)
    out_GMV = torch.matmul(probabilities_GMS, v_SGV.transpose(0, 1))
    return out_GMV.view(G, N // G, T, V).permute(2, 0, 1, 3).reshape(T, N, V)


PLUGIN = Backend(rank=10, run=run, refuse=refuse)
