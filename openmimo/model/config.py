"""What a model is, without torch: geometry layer by layer, experts, prediction heads. Presets are in `presets.py`.

Geometry is kept per layer and never once per model, because full and sliding layers differ in key/value heads and RoPE
base, and family members differ in more.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeFloat, check_fields

# The largest values are far above every published model: an impossible one is refused before a tensor is described, and
# no product of them overflows 64 bits.
MAX_LAYERS = 1024
Size = Annotated[int, Bounds(least=1, most=1 << 20)]
LayerCount = Annotated[int, Bounds(least=1, most=MAX_LAYERS)]
HeadCount = Annotated[int, Bounds(least=1, most=1 << 16)]
MTPHeadCount = Annotated[int, Bounds(least=1, most=64)]
VocabSize = Annotated[int, Bounds(least=1, most=1 << 24)]
Positions = Annotated[int, Bounds(least=1, most=1 << 31)]
RopeTheta = Annotated[float, Bounds(least=1, most=1e15)]
Scale = Annotated[float, Bounds(above=0, most=1e4)]
Share = Annotated[float, Bounds(above=0, most=1)]
Epsilon = Annotated[float, Bounds(above=0, most=1)]
MAX_EXPERTS = 1 << 17  # of all layers together


@dataclass(frozen=True)
class AttentionConfig:
    """Geometry of one attention layer.

    kind: a file in `openmimo/model/attention`. window_keys: how many keys a query sees, itself included (None for full
    attention). sink: a learned logit per query head that takes probability and gives no value. rotary_dim: the leading
    dims of query and key that are rotated.
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

    def __post_init__(self) -> None:
        check_fields(self, f"attention {self.kind!r}")


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: its attention, and whether its feed-forward part is "dense" or "moe"."""

    attention: AttentionConfig
    ffn: Literal["dense", "moe"]

    def __post_init__(self) -> None:
        check_fields(self, "layer")


@dataclass(frozen=True)
class MoEConfig:
    """Sparse feed-forward layers: sigmoid scores, top-k by score plus selection bias, weights from the scores alone."""

    num_experts: Size
    experts_per_token: Size
    expert_dim: Size
    num_groups: Size = 1
    groups_per_token: Size = 1
    normalize_weights: bool = True
    routed_scale: Scale = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "moe")


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction heads (paper section 2.3): `num_heads` blocks, each one attention layer and a dense FFN.

    hidden: which state of the main model a head reads, "pre_norm" (the residual stream) or "post_norm" (after the final
    norm). Head k at position i reads that state and the embedding of token i+1+k, and predicts token i+2+k.
    """

    num_heads: MTPHeadCount
    attention: AttentionConfig
    hidden: Literal["pre_norm", "post_norm"] = "pre_norm"

    def __post_init__(self) -> None:
        check_fields(self, "mtp")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. `family` names the checkpoint layout: "mimo_v2_flash", or "mimo" for the dense MiMo-7B line."""

    vocab_size: VocabSize
    hidden_size: Size
    dense_ffn_dim: Size
    layers: tuple[LayerConfig, ...]
    moe: MoEConfig | None = None
    mtp: MTPConfig | None = None
    norm_epsilon: Epsilon = 1e-5
    value_scale: Scale = 1.0
    attention_bias: bool = False
    tie_embeddings: bool = False
    init_std: NonNegativeFloat = 0.02
    max_positions: Positions = 32768
    family: Literal["mimo_v2_flash", "mimo"] = "mimo_v2_flash"
    token_ids: dict[str, int | list[int] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ConfigError(f"model.layers has {len(self.layers)} entries; it must have 1 to {MAX_LAYERS}.")
        for number, layer in enumerate(self.layers):
            _check_attention(layer.attention, f"layer {number}")
            if layer.ffn == "moe" and self.moe is None:
                raise ConfigError(f"layer {number} is 'moe', but the config describes no experts (moe is None).")
        if self.moe is not None:
            _check_moe(self.moe, sum(layer.ffn == "moe" for layer in self.layers))
        if self.mtp is not None:
            _check_attention(self.mtp.attention, "the MTP heads")
        for name, ids in self.token_ids.items():
            for token_id in ids if isinstance(ids, list) else [ids]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ConfigError(f"{name} is {token_id}; the vocabulary has the ids 0 to {self.vocab_size - 1}.")

    @property
    def num_mtp_heads(self) -> int:
        """How many prediction heads there are beside the main one."""
        return self.mtp.num_heads if self.mtp else 0

    @property
    def qkv_ranks(self) -> int:
        """Slices into which the published checkpoints stack q, k and v: one per key/value head of a full layer."""
        full = [layer.attention for layer in self.layers if layer.attention.kind == "full"]
        return (full[0] if full else self.layers[0].attention).num_kv_heads

    def attention_layers(self) -> tuple[AttentionConfig, ...]:
        """Geometry of every layer that remembers keys: the main layers, then one per MTP head."""
        heads = (self.mtp.attention,) * self.mtp.num_heads if self.mtp else ()
        return tuple(layer.attention for layer in self.layers) + heads

    def with_full_rope_theta(self, theta: float) -> "ModelConfig":
        """The same model with another RoPE base in its full layers (context extension; sliding layers keep theirs)."""
        layers = tuple(
            replace(layer, attention=replace(layer.attention, rope_theta=theta))
            if layer.attention.kind == "full"
            else layer
            for layer in self.layers
        )
        mtp = self.mtp
        if mtp is not None and mtp.attention.kind == "full":
            mtp = replace(mtp, attention=replace(mtp.attention, rope_theta=theta))
        return replace(self, layers=layers, mtp=mtp)

    def with_mtp_heads(self, num_heads: int) -> "ModelConfig":
        """The same model with `num_heads` prediction heads; it must have at least one to take the geometry from."""
        if self.mtp is None:
            raise ConfigError("the model has no MTP head to replicate; give its config an `mtp` entry.")
        return replace(self, mtp=replace(self.mtp, num_heads=num_heads))


def _check_attention(attention: AttentionConfig, where: str) -> None:
    if attention.num_heads % attention.num_kv_heads:
        raise ConfigError(
            f"{where} has {attention.num_heads} heads, which {attention.num_kv_heads} key/value heads do not divide."
        )
    if attention.rotary_dim % 2 or attention.rotary_dim > attention.key_dim:
        raise ConfigError(
            f"{where} rotates {attention.rotary_dim} of {attention.key_dim} key dims; it must be even and no larger. "
            "It is int(key_dim x partial_rotary_factor)."
        )
    if (attention.kind == "sliding") != (attention.window_keys is not None):
        raise ConfigError(
            f"{where} is {attention.kind!r} with window_keys {attention.window_keys}; only sliding has one."
        )


def _check_moe(moe: MoEConfig, num_layers: int) -> None:
    if num_layers * moe.num_experts > MAX_EXPERTS:
        raise ConfigError(
            f"{num_layers} layers of {moe.num_experts} experts are more than {MAX_EXPERTS:,} experts in all."
        )
    if moe.experts_per_token > moe.num_experts:
        raise ConfigError(f"experts_per_token is {moe.experts_per_token}; it must be 1 to {moe.num_experts}.")
    if moe.num_experts % moe.num_groups or moe.groups_per_token > moe.num_groups:
        raise ConfigError(
            f"{moe.num_experts} experts cannot form {moe.num_groups} groups, {moe.groups_per_token} chosen."
        )
    group_size = moe.num_experts // moe.num_groups
    if moe.num_groups > 1 and (group_size < 2 or moe.groups_per_token * group_size < moe.experts_per_token):
        raise ConfigError(
            f"{moe.groups_per_token} chosen groups of {group_size} experts cannot give {moe.experts_per_token} experts "
            "to a token (a group has two or more)."
        )
