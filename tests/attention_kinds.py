"""Attention kinds for tests: layers that read the keys and values of an earlier layer.

SHARED projects queries and outputs only. SCORED also multiplies the output of each head by a number computed from the
block scores that the earlier layer left in the context.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from openmimo.model.attention import AttentionConfig, AttentionKind, AttentionPlace, KVSpec, keys_within

if TYPE_CHECKING:
    from torch import nn


def build_shared(place: AttentionPlace) -> "nn.Module":
    from tests.shared_attention import SharedAttention

    return SharedAttention(place)


def build_scored(place: AttentionPlace) -> "nn.Module":
    from tests.shared_attention import ScoredAttention

    return ScoredAttention(place)


def check_shared(spec: AttentionConfig, source: AttentionConfig | None) -> str | None:
    if source is None:
        return "is a shared layer without kv_from."
    if source.window_keys is not None and (spec.window_keys is None or spec.window_keys > source.window_keys):
        return f"has window_keys {spec.window_keys}, but layer {spec.kv_from} keeps the keys of {source.window_keys}."
    return None


def check_scored(spec: AttentionConfig, source: AttentionConfig | None) -> str | None:
    if source is not None and source.score_block is None:
        return f"reads the block scores of layer {spec.kv_from}, which has no score_block."
    return check_shared(spec, source)


SHARED = AttentionKind(
    build=build_shared,
    kv=lambda spec: KVSpec(spec.num_kv_heads, spec.key_dim, spec.value_dim, None, source_layer=spec.kv_from),
    visible_keys=lambda spec, length: keys_within(length, spec.window_keys),
    is_global=lambda spec: spec.window_keys is None,
    check=check_shared,
)
SCORED = replace(SHARED, build=build_scored, check=check_scored)
