"""Sliding-window attention: a query reads its own key and the `window_keys - 1` before it, and only they are kept."""

from openmimo.model.attention import AttentionKind, KVSpec

PLUGIN = AttentionKind(
    kv=lambda spec: KVSpec(spec.num_kv_heads, spec.key_dim, spec.value_dim, keep_positions=spec.window_keys - 1),
    visible_keys=lambda spec, position: min(position + 1, spec.window_keys),
)
