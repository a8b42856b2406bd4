"""Full causal attention: a query reads every key up to its own position, and all of them are remembered."""

from openmimo.model.attention import AttentionKind, KVSpec

PLUGIN = AttentionKind(
    kv=lambda spec: KVSpec(spec.num_kv_heads, spec.key_dim, spec.value_dim, keep_positions=None),
    visible_keys=lambda spec, position: position + 1,
)
