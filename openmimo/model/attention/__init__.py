"""Attention kinds, one file each, and the geometry of a layer, without torch.

A kind defines the module of a layer and its cache requirements. A kind of another package is named
`package.module:Object`; `docs/model.md` describes how to add one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from openmimo.core.fields import Bounds, NonNegativeInt, check_fields
from openmimo.core.registry import Registry

# The upper bounds are far above every published model. They refuse an impossible config before a tensor is described,
# and no product of sizes overflows 64 bits.
Size = Annotated[int, Bounds(least=1, most=1 << 20)]
HeadCount = Annotated[int, Bounds(least=1, most=1 << 16)]
Positions = Annotated[int, Bounds(least=1, most=1 << 31)]
RopeTheta = Annotated[float, Bounds(least=1, most=1e15)]


@dataclass(frozen=True)
class AttentionConfig:
    """Geometry of one attention layer.

    Attributes:
        kind: Name of a file in `openmimo/model/attention`, or `package.module:Object`.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        key_dim: Dims of a query and a key.
        value_dim: Dims of a value.
        rotary_dim: Number of leading dims of queries and keys that are rotated.
        rope_theta: RoPE base.
        window_keys: Keys that a query sees, its own included (None for full attention).
        sink: Whether each query head has a learned sink logit, which takes probability and has no value.
        kv_from: Index of the earlier layer whose keys and values this layer reads (None: its own).
        score_block: Keys of a block, if the layer stores block scores in the context for a later layer, or reads those
            of layer `kv_from` (None: no scores).
        selected_keys: Keys in the blocks that a query of a sparse layer reads of layer `kv_from`.
        gate: Whether the two branches of a sparse layer have one gate per head or one per channel of a head's value.
    """

    kind: str
    num_heads: HeadCount
    num_kv_heads: HeadCount
    key_dim: Size
    value_dim: Size
    rotary_dim: Size
    rope_theta: RopeTheta
    window_keys: Positions | None = None
    sink: bool = False
    kv_from: NonNegativeInt | None = None
    score_block: Size | None = None
    selected_keys: Size | None = None
    gate: Literal["head", "channel"] | None = None

    def __post_init__(self) -> None:
        check_fields(self, f"attention {self.kind!r}")


if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class KVSpec:
    """The cache requirements of one layer.

    Attributes:
        num_kv_heads: Key/value heads.
        key_dim: Dims of a key.
        value_dim: Dims of a value.
        keep_positions: Number of past positions that are kept (None: all).
        source_layer: Index of the layer whose keys and values this layer reads. The cache then stores none for it.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    keep_positions: int | None
    source_layer: int | None = None

    def bytes_per_position(self, bytes_per_value: int, *, scale_bytes: int = 0) -> int:
        """Return the cache bytes of one position. `scale_bytes` are those of the scale of a key or a value, if any."""
        if self.source_layer is not None:
            return 0
        return self.num_kv_heads * ((self.key_dim + self.value_dim) * bytes_per_value + 2 * scale_bytes)


@dataclass(frozen=True)
class AttentionPlace:
    """The arguments from which the module of one attention layer is built.

    Attributes:
        spec: Geometry of the layer.
        index: Index of the layer; MTP head h is layer `num_layers + h`.
        hidden_size: Width of its inputs and outputs.
        bias: Whether the projections of queries, keys and values have biases.
        value_scale: Factor of the values.
        is_source: Whether a later layer reads the keys and values of this one.
    """

    spec: AttentionConfig
    index: int
    hidden_size: int
    bias: bool
    value_scale: float
    is_source: bool


def refuse_sparse_settings(spec: AttentionConfig) -> str | None:
    """Return the reason why a layer that chooses no blocks refuses a geometry that does, or None."""
    if spec.selected_keys is not None or spec.gate is not None:
        return (
            f"is {spec.kind!r} with selected_keys {spec.selected_keys} and gate {spec.gate!r}, which only sparse "
            "layers have."
        )
    return None


class AttentionModule(Protocol):
    """The attributes that the model reads and sets on the module of an attention layer, besides calling it.

    Attributes:
        spec: Geometry of the layer. Context extension replaces it.
    """

    spec: AttentionConfig


def standard_parameters(place: AttentionPlace) -> int:
    """Count the parameters of the query, key, value and output projections, with biases and sinks.

    A layer that reads another layer's keys has no projections of keys and values.
    """
    spec = place.spec
    inputs = spec.num_heads * spec.key_dim
    if kv_spec(spec).source_layer is None:
        inputs += spec.num_kv_heads * (spec.key_dim + spec.value_dim)
    weights = place.hidden_size * (inputs + spec.num_heads * spec.value_dim)
    return weights + (inputs if place.bias else 0) + (spec.num_heads if spec.sink else 0)


@dataclass(frozen=True)
class AttentionKind:
    """One kind of attention layer.

    Attributes:
        build: Builds the module of a layer. Its `forward(x_TD, context)` returns [T, D], and its `spec` is the geometry
            (see `AttentionModule`). `build` imports torch when it is called, so that configs are checked without torch.
        kv: Returns the cache requirements of a geometry.
        visible_keys: Returns the number of keys that the query at a position reads, for FLOPs.
        is_global: Whether queries may read keys at any distance. Context extension changes the RoPE base of these
            layers only.
        check: Returns the reason why a geometry cannot be of this kind, as the predicate of a sentence about the layer,
            or None. The second argument is the geometry of the layer that `kv_from` names, if any.
        parameters: Returns the number of parameters of the module.
        divides_heads: Whether tensor-parallel ranks may have a part of the heads each.
    """

    build: "Callable[[AttentionPlace], nn.Module]"
    kv: Callable[[AttentionConfig], KVSpec]
    visible_keys: Callable[[AttentionConfig, int], int]
    is_global: Callable[[AttentionConfig], bool]
    check: Callable[[AttentionConfig, AttentionConfig | None], str | None]
    parameters: Callable[[AttentionPlace], int] = standard_parameters
    divides_heads: bool = True


KINDS: Registry[AttentionKind] = Registry("openmimo.model.attention", AttentionKind)


@functools.cache
def attention_kind(name: str) -> AttentionKind:
    """Return the kind with this name. Raises ConfigError if there is none."""
    return KINDS.get(name)


@functools.cache
def kv_spec(spec: AttentionConfig) -> KVSpec:
    """Return the cache requirements of a layer of this geometry."""
    return attention_kind(spec.kind).kv(spec)


def is_global(spec: AttentionConfig) -> bool:
    """Return whether queries of a layer of this geometry may read keys at any distance."""
    return attention_kind(spec.kind).is_global(spec)


def build_attention(place: AttentionPlace) -> "nn.Module":
    """Build the module of one attention layer on the current default device."""
    return attention_kind(place.spec.kind).build(place)
