"""Sparse attention of HySparse (arXiv 2602.03560): chosen blocks of an earlier layer's keys, and a window of its own.

The earlier layer, `kv_from`, is full and scores blocks of `score_block` keys. A query reads the `selected_keys` keys of
the blocks with the highest scores. The cache keeps the keys of the window only.
"""

from typing import TYPE_CHECKING

from openmimo.model.attention import (
    AttentionConfig,
    AttentionKind,
    AttentionPlace,
    KVSpec,
    keys_within,
    standard_parameters,
)

if TYPE_CHECKING:
    from torch import nn


def build(place: AttentionPlace) -> "nn.Module":
    """Build the two branches and their gates."""
    from openmimo.model.sparse_attention import SparseAttention  # imports torch

    return SparseAttention(place)


def check(spec: AttentionConfig, source: AttentionConfig | None) -> str | None:
    """Refuse a geometry that lacks a part of the two branches, and a source that does not score the same blocks."""
    required = ("kv_from", "window_keys", "score_block", "selected_keys", "gate")
    if lacking := [name for name in required if getattr(spec, name) is None]:
        return f"is {spec.kind!r} without {', '.join(lacking)}; a sparse layer needs all of {', '.join(required)}."
    assert spec.selected_keys is not None and spec.score_block is not None and source is not None
    if source.window_keys is not None:
        return f"chooses among the keys of layer {spec.kv_from}, which keeps only a window; name a full layer."
    if source.score_block != spec.score_block:
        return (
            f"has score_block {spec.score_block}, but layer {spec.kv_from}, whose block scores it reads, has "
            f"{source.score_block}; they must be equal."
        )
    if spec.selected_keys % spec.score_block:
        return f"has selected_keys {spec.selected_keys}, which is not a multiple of score_block {spec.score_block}."
    return None


def parameters(place: AttentionPlace) -> int:
    """Count the standard projections, the second sink, and the two gates."""
    spec = place.spec
    gates = spec.num_heads * (spec.value_dim if spec.gate == "channel" else 1)
    return standard_parameters(place) + (spec.num_heads if spec.sink else 0) + 2 * place.hidden_size * gates


def _visible_keys(spec: AttentionConfig, length: int) -> int:
    assert spec.window_keys is not None and spec.selected_keys is not None, "checked by the model's config"
    return keys_within(length, spec.selected_keys) + keys_within(length, spec.window_keys)


def _kv(spec: AttentionConfig) -> KVSpec:
    assert spec.window_keys is not None, "checked by the model's config"
    return KVSpec(spec.num_kv_heads, spec.key_dim, spec.value_dim, keep_positions=spec.window_keys - 1)


PLUGIN = AttentionKind(
    build=build,
    kv=_kv,
    visible_keys=_visible_keys,
    is_global=lambda spec: True,
    check=check,
    parameters=parameters,
    divides_heads=False,
)
