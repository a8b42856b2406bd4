"""Attention kinds: one file each. A kind says what a layer computes and what it must remember between calls."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from openmimo.core.registry import Registry
from openmimo.model.config import AttentionConfig


@dataclass(frozen=True)
class KVSpec:
    """What a cache holds for one layer: heads and dims of keys and values, and how many past positions (None: all)."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    keep_positions: int | None

    def bytes_per_position(self, bytes_per_value: int) -> int:
        """Cache bytes of one position."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * bytes_per_value


@dataclass(frozen=True)
class AttentionKind:
    """kv: what must be remembered. visible_keys: how many keys the query at a position reads (for FLOPs)."""

    kv: Callable[[AttentionConfig], KVSpec]
    visible_keys: Callable[[AttentionConfig, int], int]


KINDS: Registry[AttentionKind] = Registry("openmimo.model.attention", AttentionKind)


@functools.cache
def kv_spec(spec: AttentionConfig) -> KVSpec:
    """What a cache must hold for a layer of this geometry."""
    return KINDS.get(spec.kind).kv(spec)
