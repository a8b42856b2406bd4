"""Full causal attention with linear biases in place of RoPE (ALiBi, 2108.12409).

Head h of N subtracts slope_h x distance from its logits, with the slopes 2^(-8 (h + 1) / N). The softmax ignores a
constant, so -slope x (i - j) has the effect of slope x j. Keys get their position as additional dims, four digits of
base 256 that are exact in bfloat16, and queries get the slope times the weight of each digit:

    key_j   = [k, digits of j]            query_i = [q, slope x (256^3, 256^2, 256, 1)]

Therefore every attention backend, cache format and window works unchanged, and a cache stores the digits with the keys.
The logits grow with the position; float32 resolves them to 0.004 at 64K positions for the largest slope.
"""

from typing import TYPE_CHECKING

from openmimo.model.attention import AttentionConfig, AttentionKind, AttentionPlace, KVSpec, keys_within
from openmimo.model.attention.full import check as check_full

if TYPE_CHECKING:
    from torch import nn

_POSITION_DIMS = 4


def build(place: AttentionPlace) -> "nn.Module":
    """Build grouped-query attention with position dims."""
    from openmimo.model.alibi import AlibiAttention  # imports torch

    return AlibiAttention(place)


def check(spec: AttentionConfig, source: AttentionConfig | None) -> str | None:
    """Refuse what `full` refuses, RoPE, a sink (its logit would need the bias as well) and block scores."""
    if reason := check_full(spec, source):
        return reason
    if spec.rotary_dim:
        return f"is {spec.kind!r} with rotary_dim {spec.rotary_dim}; it must be 0, because biases replace RoPE."
    if spec.sink or spec.score_block is not None:
        return f"is {spec.kind!r} with a sink or block scores, which this kind does not support."
    return None


PLUGIN = AttentionKind(
    build=build,
    kv=lambda spec: KVSpec(spec.num_kv_heads, spec.key_dim + _POSITION_DIMS, spec.value_dim, keep_positions=None),
    visible_keys=lambda spec, length: keys_within(length, None),
    is_global=lambda spec: True,
    check=check,
)
