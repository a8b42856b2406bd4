"""Full attention in integers on any device: the definition, in torch (see `_integers`). For calls that allow it.

T queries, S keys, N query heads, G key/value heads, K key dim, V value dim.
"""

import torch

from openmimo.kernels.attention import AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import refuse_integers
from openmimo.kernels.attention._integers import IntegerSettings, attend_in_integers
from openmimo.kernels.dispatch import Backend


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
    assert need.integers is not None, "refused before"
    settings = IntegerSettings(values=need.integers)
    keys, values = k_SGK.split(need.key_lengths), v_SGV.split(need.key_lengths)
    outputs = [
        attend_in_integers(q, k, v, sink_N, scale=scale, causal=need.causal, settings=settings)[0]
        for q, k, v in zip(q_TNK.split(need.query_lengths), keys, values, strict=True)
    ]
    return AttentionOut(torch.cat(outputs).to(q_TNK.dtype))


PLUGIN = Backend(priority=100, run=run, refuse=refuse_integers)
