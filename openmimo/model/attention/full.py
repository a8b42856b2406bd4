"""Full causal attention: a query reads every key up to its own position, and the cache keeps all of them."""

from typing import TYPE_CHECKING

from openmimo.model.attention import AttentionConfig, AttentionKind, AttentionPlace, KVSpec

if TYPE_CHECKING:
    from torch import nn


def build(place: AttentionPlace) -> "nn.Module":
    """Build grouped-query attention with its own keys."""
    from openmimo.model.layers import Attention  # imports torch

    return Attention(place)


def check(spec: AttentionConfig, source: AttentionConfig | None) -> str | None:
    """Refuse a window and the keys of another layer."""
    if spec.window_keys is not None:
        return f"is {spec.kind!r} with window_keys {spec.window_keys}; a full layer has no window."
    if source is not None:
        return f"is {spec.kind!r} with kv_from {spec.kv_from}; a full layer has its own keys."
    return None


PLUGIN = AttentionKind(
    build=build,
    kv=lambda spec: KVSpec(spec.num_kv_heads, spec.key_dim, spec.value_dim, keep_positions=None),
    visible_keys=lambda spec, position: position + 1,
    is_global=lambda spec: True,
    check=check,
)
