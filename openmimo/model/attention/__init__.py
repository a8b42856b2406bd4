"""Attention kinds, one file each, and the geometry of a layer, without torch.

A kind defines the module of a layer and its cache requirements. A kind of another package is named
`package.module:Object`; `docs/model.md` describes how to add one.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Protocol

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeInt, PositiveFloat, check_fields
from openmimo.core.registry import Registry

# The upper bounds are far above every published model. They refuse an impossible config before a tensor is described,
# and no product of sizes overflows 64 bits.
Size = Annotated[int, Bounds(least=1, most=1 << 20)]
HeadCount = Annotated[int, Bounds(least=1, most=1 << 16)]
Positions = Annotated[int, Bounds(least=1, most=1 << 31)]
RopeTheta = Annotated[float, Bounds(least=1, most=1e15)]


RotaryDim = Annotated[int, Bounds(least=0, most=1 << 20)]
Factor = Annotated[float, Bounds(least=1, most=1e6)]


class Rotation(NamedTuple):
    """The arguments of `kernels.operations.rotary_table` of one geometry, a key of tables that layers share.

    Attributes:
        rotary_dim: Rotated dims, R.
        theta: RoPE base.
        divisors: Divisor of each of the R/2 frequencies; empty for plain RoPE.
        amplitude: Factor of cos and sin.
    """

    rotary_dim: int
    theta: float
    divisors: tuple[float, ...] = ()
    amplitude: float = 1.0


@dataclass(frozen=True)
class RopeScaling:
    """Extension of RoPE beyond the positions of the training, with frequencies that do not depend on the length.

        linear     position interpolation (2306.15595): every frequency is divided by the factor
        ntk        NTK-aware: the base is raised such that the lowest frequency is divided by the factor
        yarn       YaRN (2309.00071): low frequencies are divided, high ones are not, with a ramp between them
        longrope   LongRoPE (2402.13753): a divisor for each frequency, found by a search

    Methods whose frequencies depend on the length of a text (transformers' `dynamic`) are not supported, because a
    cache holds keys that were rotated before the length is known.

    Attributes:
        kind: The method (none: plain RoPE; in a training config: as before).
        factor: Extension of the context.
        original_positions: Positions of the training (yarn, longrope).
        beta_fast: Rotations within the original positions above which a frequency is unchanged (yarn).
        beta_slow: Rotations below which a frequency is divided by the whole factor (yarn).
        divisors: The divisor of each frequency (longrope).
        amplitude: Factor of cos and sin (None: that of the method; yarn: 0.1 ln(factor) + 1, longrope:
            sqrt(1 + ln(factor) / ln(original_positions)), else 1).
    """

    kind: Literal["none", "linear", "ntk", "yarn", "longrope"] = "none"
    factor: Factor = 1.0
    original_positions: Positions | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    divisors: tuple[Factor, ...] = ()
    amplitude: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check_fields(self, "rope scaling")
        if self.kind == "none" and self.factor != 1.0:
            raise ConfigError("rope scaling has a factor, but its kind is 'none'; give the kind, such as yarn.")
        if self.kind in ("yarn", "longrope") and (self.original_positions is None or self.original_positions < 2):
            raise ConfigError(f"rope scaling {self.kind!r} needs original_positions, the positions of the training.")
        if self.kind in ("none", "linear", "ntk") and self.amplitude is not None:
            raise ConfigError(f"rope scaling {self.kind!r} has no amplitude; leave it out.")
        if (self.kind == "longrope") != bool(self.divisors):
            raise ConfigError("rope scaling: only 'longrope' has divisors, and it needs them.")

    def rotation(self, rotary_dim: int, theta: float) -> Rotation:
        """The rotation of `rotary_dim` dims with the base `theta`. Raises ConfigError if the divisors do not fit."""
        half = rotary_dim // 2
        divisors: tuple[float, ...]
        if self.kind == "none":
            divisors = ()
        elif self.kind == "linear":
            divisors = (self.factor,) * half
        elif self.kind == "ntk":
            divisors = tuple(self.factor ** (pair / max(half - 1, 1)) for pair in range(half))
        elif self.kind == "longrope":
            divisors = self.divisors
            if len(divisors) != half:
                raise ConfigError(f"rope scaling has {len(divisors)} divisors for {half} frequencies.")
        else:
            divisors = tuple(self._yarn_divisor(pair, rotary_dim, theta) for pair in range(half))
        return Rotation(rotary_dim, theta, divisors, self._amplitude())

    def _yarn_divisor(self, pair: int, rotary_dim: int, theta: float) -> float:
        first = math.floor(self._pair_of(self.beta_fast, rotary_dim, theta))
        last = math.ceil(self._pair_of(self.beta_slow, rotary_dim, theta))
        first, last = max(first, 0), min(last, rotary_dim - 1)
        ramp = (pair - first) / (last - first if last != first else 0.001)
        share = min(max(ramp, 0.0), 1.0)
        return 1.0 / (share / self.factor + (1.0 - share))

    def _pair_of(self, rotations: float, rotary_dim: int, theta: float) -> float:
        """The (fractional) number of the frequency that makes `rotations` within the original positions."""
        assert self.original_positions is not None
        if theta <= 1.0:
            raise ConfigError(f"rope scaling 'yarn' needs a RoPE base above 1; it is {theta}.")
        return rotary_dim * math.log(self.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def _amplitude(self) -> float:
        if self.amplitude is not None:
            return self.amplitude
        if self.factor <= 1.0 or self.kind in ("none", "linear", "ntk"):
            return 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        assert self.original_positions is not None
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_positions))


@dataclass(frozen=True)
class AttentionConfig:
    """Geometry of one attention layer.

    Attributes:
        kind: Name of a file in `openmimo/model/attention`, or `package.module:Object`.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        key_dim: Dims of a query and a key.
        value_dim: Dims of a value.
        rotary_dim: Number of leading dims of queries and keys that are rotated (0: no positions, NoPE).
        rope_theta: RoPE base.
        window_keys: Keys that a query sees, its own included (None for full attention).
        sink: Whether each query head has a learned sink logit, which takes probability and has no value.
        kv_from: Index of the earlier layer whose keys and values this layer reads (None: its own).
        score_block: Keys of a block, if the layer stores block scores in the context for a later layer, or reads those
            of layer `kv_from` (None: no scores).
        selected_keys: Keys in the blocks that a query of a sparse layer reads of layer `kv_from`.
        gate: Whether the two branches of a sparse layer have one gate per head or one per channel of a head's value.
        rope_scaling: Extension of RoPE (None: plain RoPE).
    """

    kind: str
    num_heads: HeadCount
    num_kv_heads: HeadCount
    key_dim: Size
    value_dim: Size
    rotary_dim: RotaryDim
    rope_theta: RopeTheta
    window_keys: Positions | None = None
    sink: bool = False
    kv_from: NonNegativeInt | None = None
    score_block: Size | None = None
    selected_keys: Size | None = None
    gate: Literal["head", "channel"] | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_fields(self, f"attention {self.kind!r}")

    @functools.cached_property
    def rotation(self) -> Rotation:
        """The rotation of queries and keys."""
        if self.rope_scaling is None:
            return Rotation(self.rotary_dim, self.rope_theta)
        return self.rope_scaling.rotation(self.rotary_dim, self.rope_theta)


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
        visible_keys: Returns the number of keys that all queries of a sequence of some length read, for FLOPs.
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


def keys_within(length: int, most: int | None) -> int:
    """Count the keys that all queries of a sequence read.

    Args:
        length: Tokens of the sequence.
        most: The most keys that a query reads (None: its own key and all before it).
    """
    reached = length if most is None else min(length, most)
    return reached * (reached + 1) // 2 + (length - reached) * reached


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
