"""Sliding-window attention: a query reads its own key and the `window_keys - 1` before it. The cache keeps these."""

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
    """Refuse a geometry without a window, the keys of another layer, block scores (early blocks are evicted), and
    settings of sparse layers.
    """
    if spec.window_keys is None:
        return f"is {spec.kind!r} with window_keys None; a sliding layer needs a window."
    if source is not None:
        return f"is {spec.kind!r} with kv_from {spec.kv_from}; a sliding layer has its own keys."
    if spec.score_block is not None:
        return f"is {spec.kind!r} with score_block {spec.score_block}; only a layer without a window scores blocks."
    return refuse_sparse_settings(spec)


def _window(spec: AttentionConfig) -> int:
    assert spec.window_keys is not None, "checked by the model's config"
    return spec.window_keys


PLUGIN = AttentionKind(
    build=build,
    kv=lambda spec: KVSpec(spec.num_kv_heads, spec.key_dim, spec.value_dim, keep_positions=_window(spec) - 1),
    visible_keys=lambda spec, length: keys_within(length, _window(spec)),
    is_global=lambda spec: False,
    check=check,
)
