"""Full causal attention: a query reads every key up to its own position, and the cache keeps all of them."""

from typing import TYPE_CHECKING

from openmimo.model.attention import (
    AttentionConfig,
    AttentionKind,
    AttentionPlace,
    KVSpec,
    keys_within,
    refuse_sparse_settings,
)

if TYPE_CHECKING:
    from torch import nn


def build(place: AttentionPlace) -> "nn.Module":
    """Build grouped-query attention with its own keys."""
    from openmimo.model.layers import Attention  # imports torch

    return Attention(place)


def check(spec: AttentionConfig, source: AttentionConfig | None) -> str | None:
    """Refuse a window, the keys of another layer, and settings of sparse layers."""
    if spec.window_keys is not None:
        return f"is {spec.kind!r} with window_keys {spec.window_keys}; a full layer has no window."
    if source is not None:
        return f"is {spec.kind!r} with kv_from {spec.kv_from}; a full layer has its own keys."
    return refuse_sparse_settings(spec)


PLUGIN = AttentionKind(
    build=build,
    kv=lambda spec: KVSpec(spec.num_kv_heads, spec.key_dim, spec.value_dim, keep_positions=None),
    visible_keys=lambda spec, length: keys_within(length, None),
    is_global=lambda spec: True,
    check=check,
)
