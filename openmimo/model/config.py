"""What a model is, without torch: geometry layer by layer, experts, prediction heads. Presets are in `presets.py`.

Geometry is kept per layer and never once per model, because full and sliding layers differ in key/value heads and RoPE
base, and family members differ in more.
"""

from dataclasses import dataclass, field, replace

from openmimo.core.errors import ConfigError


@dataclass(frozen=True)
class AttentionConfig:
    """Geometry of one attention layer.

    kind: a file in `openmimo/model/attention`. window_keys: how many keys a query sees, itself included (None for full
    attention). sink: a learned logit per query head that takes probability and gives no value. rotary_dim: the leading
    dims of query and key that are rotated.
    """

    kind: str
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    rotary_dim: int
    rope_theta: float
    window_keys: int | None = None
    sink: bool = False


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: its attention, and whether its feed-forward part is "dense" or "moe"."""

    attention: AttentionConfig
    ffn: str


@dataclass(frozen=True)
class MoEConfig:
    """Sparse feed-forward layers: sigmoid scores, top-k by score plus selection bias, weights from the scores alone."""

    num_experts: int
    experts_per_token: int
    expert_dim: int
    num_groups: int = 1
    groups_per_token: int = 1
    normalise_weights: bool = True
    routed_scale: float = 1.0


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction heads (paper section 2.3): `num_heads` blocks, each one attention layer and a dense FFN.

    hidden: which state of the main model a head reads, "pre_norm" (the residual stream) or "post_norm" (after the final
    norm). Head k at position i reads that state and the embedding of token i+1+k, and predicts token i+2+k.
    """

    num_heads: int
    attention: AttentionConfig
    hidden: str = "pre_norm"


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. `family` names the checkpoint layout: "mimo_v2_flash", or "mimo" for the dense MiMo-7B line."""

    vocab_size: int
    hidden_size: int
    dense_ffn_dim: int
    layers: tuple[LayerConfig, ...]
    moe: MoEConfig | None = None
    mtp: MTPConfig | None = None
    norm_epsilon: float = 1e-5
    value_scale: float = 1.0
    attention_bias: bool = False
    tie_embeddings: bool = False
    init_std: float = 0.02
    max_positions: int = 32768
    family: str = "mimo_v2_flash"
    token_ids: dict[str, int | list[int] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, layer in enumerate(self.layers):
            _check_attention(layer.attention, f"layer {number}")
            if layer.ffn not in ("dense", "moe"):
                raise ConfigError(f"layer {number} has ffn {layer.ffn!r}; it must be 'dense' or 'moe'.")
            if layer.ffn == "moe" and self.moe is None:
                raise ConfigError(f"layer {number} is 'moe', but the config describes no experts (moe is None).")
        if self.moe is not None:
            _check_moe(self.moe)
        if self.mtp is not None:
            _check_attention(self.mtp.attention, "the MTP heads")
            if self.mtp.hidden not in ("pre_norm", "post_norm"):
                raise ConfigError(f"mtp.hidden is {self.mtp.hidden!r}; it must be 'pre_norm' or 'post_norm'.")
        if self.family not in ("mimo_v2_flash", "mimo"):
            raise ConfigError(f"family is {self.family!r}; it must be 'mimo_v2_flash' or 'mimo'.")

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
    if attention.window_keys is not None and attention.window_keys < 1:
        raise ConfigError(
            f"{where} has window_keys {attention.window_keys}; a query sees at least itself, so 1 or more."
        )


def _check_moe(moe: MoEConfig) -> None:
    if not 1 <= moe.experts_per_token <= moe.num_experts:
        raise ConfigError(f"experts_per_token is {moe.experts_per_token}; it must be 1 to {moe.num_experts}.")
    if moe.num_experts % moe.num_groups or moe.groups_per_token > moe.num_groups:
        raise ConfigError(
            f"{moe.num_experts} experts cannot form {moe.num_groups} groups, {moe.groups_per_token} chosen."
        )
