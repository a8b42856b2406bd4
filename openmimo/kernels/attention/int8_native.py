"""Full attention in integers on a CPU (native/causal.c): prompts and chunks of prompts, for calls that allow it.

Probabilities are rounded relative to the running maximum of a row, and in the definition relative to the final one.

The mean of the keys and the scale of the values depend on all keys of a sequence in the call. So the chunks in which a
prompt is read change the last digits, as a cache in a narrower dtype does.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import CAUSAL_ONLY, AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import MAX_DECODE_QUERIES, call_causal_kernel, refuse_integers
from openmimo.kernels.attention._integers import LARGEST_CODE
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
    """Implement `openmimo.kernels.attention.attend`. Raises MemoryError as `native` does."""
    keys, values = k_SGK.split(need.key_lengths), v_SGV.split(need.key_lengths)
    means_BGK = torch.stack([k.mean(0, dtype=torch.float32) for k in keys])
    scales_BG = torch.stack([v.abs().amax((0, 2)).float() / LARGEST_CODE for v in values])
    return call_causal_kernel(
        q_TNK, k_SGK, v_SGV, sink_N, need, scale, key_means_BGK=means_BGK, value_scales_BG=scales_BG
    )


def refuse(need: AttentionNeed) -> str | None:
    """Refuse decoding, accelerators, calls that do not allow integers, and all but causal attention to many queries."""
    if reason := refuse_integers(need):
        return reason
    if not need.causal:
        return CAUSAL_ONLY
    if max(need.query_lengths, default=0) <= MAX_DECODE_QUERIES or min(need.key_lengths, default=0) < 1:
        return f"with at most {MAX_DECODE_QUERIES} queries a sequence, quantizing the keys costs more than it saves"
    return native.refuse(need)


PLUGIN = Backend(priority=110, run=run, refuse=refuse)
