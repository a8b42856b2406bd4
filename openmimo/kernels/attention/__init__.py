"""Grouped-query causal attention over packed sequences, with an optional window and an optional learned sink.

Shapes: T packed queries, S packed keys, N query heads, G key/value heads (query head n reads head n // (N / G)),
K key dim, V value dim. Sequence b has `query_lengths[b]` consecutive queries and `key_lengths[b]` consecutive keys.
Its queries are the last positions of its keys. Query i therefore sees keys j <= key_length - query_length + i, and with
a window only the last `window_keys` of those, its own key included (paper section 2.2; equations 2-4 for the sink).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher

NO_SCORES = "it computes no block scores"
CAUSAL_ONLY = "it computes causal attention only"
DISPATCHER = Dispatcher("openmimo.kernels.attention", "OPENMIMO_ATTENTION")


class AttentionOut(NamedTuple):
    """The result of one call.

    Attributes:
        out_TNV: Attention output, in the dtype of the queries.
        block_scores_TGC: The largest probability that any query head of a key/value head gives to any key of a block,
            float32 or wider, without gradient; 0 for blocks that the query does not see. Block c of a sequence holds
            its keys c * score_block to (c + 1) * score_block - 1; C is the number of blocks of the longest sequence.
            None if the call requests no scores.
    """

    out_TNV: torch.Tensor
    block_scores_TGC: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionNeed:
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        query_lengths: Queries of each sequence.
        key_lengths: Keys of each sequence.
        num_heads: N.
        num_kv_heads: G.
        key_dim: K.
        value_dim: V.
        window_keys: Keys that a query sees, its own included (None: all).
        has_sink: Whether there are sink logits.
        needs_gradients: Whether autograd records and an input requires a gradient.
        dtype: Dtype of the queries.
        on_cpu: Whether the queries are in CPU memory.
        score_block: Keys of a block of the requested block scores (None: no scores).
        causal: Whether later keys are hidden.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window_keys: int | None
    has_sink: bool
    needs_gradients: bool
    dtype: torch.dtype
    on_cpu: bool
    score_block: int | None = None
    causal: bool = True

    @property
    def is_self_attention(self) -> bool:
        """Whether every sequence has as many queries as keys: training, and prefill with an empty cache."""
        return self.query_lengths == self.key_lengths


def attend(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    window_keys: int | None,
    score_block: int | None = None,
    causal: bool = True,
) -> AttentionOut:
    """Attention of packed queries to packed keys, differentiable in q, k, v and sink.

    Args:
        q_TNK: Queries. Logits are scaled by 1/sqrt(K).
        k_SGK: Keys.
        v_SGV: Values.
        sink_N: Sink logit of each query head, which is not scaled; or None.
        query_lengths: Queries of each sequence.
        key_lengths: Keys of each sequence.
        window_keys: Keys that a query sees, its own included (None: all).
        score_block: Keys of a block, to request block scores (None: no scores).
        causal: Whether keys after a query's position are hidden. If not, a window extends equally far to both sides.

    Raises:
        ValueError: Lengths and shapes disagree.
    """
    T, N, K = q_TNK.shape
    S, G, V = v_SGV.shape
    if sum(query_lengths) != T or sum(key_lengths) != S or k_SGK.shape != (S, G, K) or N % G:
        raise ValueError(
            f"attention shapes do not fit: q {tuple(q_TNK.shape)}, k {tuple(k_SGK.shape)}, v {tuple(v_SGV.shape)}, "
            f"{sum(query_lengths)} queries and {sum(key_lengths)} keys by length"
        )
    tensors = (q_TNK, k_SGK, v_SGV) if sink_N is None else (q_TNK, k_SGK, v_SGV, sink_N)
    need = AttentionNeed(
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        num_heads=N,
        num_kv_heads=G,
        key_dim=K,
        value_dim=V,
        window_keys=window_keys,
        has_sink=sink_N is not None,
        needs_gradients=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        dtype=q_TNK.dtype,
        on_cpu=q_TNK.device.type == "cpu",
        score_block=score_block,
        causal=causal,
    )
    _, backend = DISPATCHER.choose(need)
    return backend.run(q_TNK, k_SGK, v_SGV, sink_N, need=need, scale=1.0 / math.sqrt(K))
