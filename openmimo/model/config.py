"""Model configs, without torch: geometry of each layer, experts, prediction heads; their parameters and FLOPs.

Geometry is stated per layer, never per model, because full and sliding layers differ in key/value heads and RoPE base,
and the models of the family differ in more. Presets are in `presets.py`.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeFloat, check_fields, renamed_keys
from openmimo.model.attention import (
    AttentionConfig,
    AttentionPlace,
    Positions,
    RopeScaling,
    Size,
    attention_kind,
    is_global,
)

MAX_LAYERS = 1024
LayerCount = Annotated[int, Bounds(least=1, most=MAX_LAYERS)]
MTPHeadCount = Annotated[int, Bounds(least=1, most=64)]
VocabSize = Annotated[int, Bounds(least=1, most=1 << 24)]
Scale = Annotated[float, Bounds(above=0, most=1e4)]
Share = Annotated[float, Bounds(above=0, most=1)]
Epsilon = Annotated[float, Bounds(above=0, most=1)]
MAX_EXPERTS = 1 << 17  # the sum over all layers


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer.

    Attributes:
        attention: Geometry of the attention layer.
        ffn: Kind of the feed-forward layer.
    """

    attention: AttentionConfig
    ffn: Literal["dense", "moe"]

    def __post_init__(self) -> None:
        check_fields(self, "layer")


@dataclass(frozen=True)
class MoEConfig:
    """Sparse feed-forward layers. Experts are chosen by sigmoid score plus selection bias and weighted by the score.

    Attributes:
        num_experts: Experts of a layer.
        experts_per_token: Experts that are active for a token.
        expert_dim: Hidden dim of an expert.
        num_groups: Groups of equal size into which the experts are divided.
        groups_per_token: Groups from which the experts of a token are chosen.
        normalize_weights: Whether the weights of a token's experts are divided by their sum.
        routed_scale: Factor of the weights.
    """

    num_experts: Size
    experts_per_token: Size
    expert_dim: Size
    num_groups: Size = 1
    groups_per_token: Size = 1
    normalize_weights: bool = True
    routed_scale: Scale = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "moe")


@renamed_keys({"num_heads": "num_layers"})
@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction heads (paper section 2.3). Each is one block: an attention layer and a dense FFN.

    Head k at position i reads a state of the main model and the embedding of token i+1+k, and predicts token i+2+k.

    Attributes:
        num_layers: Number of blocks (`num_nextn_predict_layers` in published configs).
        attention: Geometry of the attention layers of the blocks.
        hidden: The state that a head reads: "pre_norm" (the residual stream) or "post_norm" (after the final norm).
    """

    num_layers: MTPHeadCount
    attention: AttentionConfig
    hidden: Literal["pre_norm", "post_norm"] = "pre_norm"

    def __post_init__(self) -> None:
        check_fields(self, "mtp")


@dataclass(frozen=True)
class ActivationConfig:
    """What a training step keeps of its activations; see `model.activations`.

    Attributes:
        recompute: What `activation_checkpointing` computes again in the backward pass: "layers" (all of a layer),
            "but_attention" (all but the attention operation, which is most of the work of long sequences), "attention"
            (with its projections) or "ffn" (the FFN, or router and experts).
        recompute_every: Recompute every n-th layer only.
        ffn_chunks: Parts of the tokens that a dense FFN or the experts compute one after another, each again in the
            backward pass. Sums over tokens, such as the weights' gradients, then add up in another order.
        offload: Keep what a layer saves in the memory of the host.
    """

    recompute: Literal["layers", "but_attention", "attention", "ffn"] = "layers"
    recompute_every: Annotated[int, Bounds(least=1, most=MAX_LAYERS)] = 1
    ffn_chunks: Annotated[int, Bounds(least=1, most=1 << 16)] = 1
    offload: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "activations")
        if self.recompute == "ffn" and self.ffn_chunks > 1:
            raise ConfigError(
                "activations.ffn_chunks recomputes each chunk already, so recompute 'ffn' has no effect; leave one out."
            )

    def check(self, *, checkpointing: bool) -> None:
        """Raise ConfigError for settings without effect in a run with or without `activation_checkpointing`."""
        default = ActivationConfig()
        for name in ("recompute", "recompute_every"):
            if not checkpointing and getattr(self, name) != getattr(default, name):
                raise ConfigError(
                    f"activations.{name} is {getattr(self, name)!r}, which has no effect without "
                    "activation_checkpointing; set it, or leave this out."
                )


@dataclass(frozen=True)
class ComplexConfig:
    """Complex-valued layers (Fairy+-i, arXiv 2508.05571): all but the router and the output head.

    All dims of the model's config count real numbers: a state of `hidden_size` numbers has half as many complex ones.

    Attributes:
        conjugate: Whether linear layers compute W conj(x), as the released models do, or W x.
        score_scale: Attention scores are divided by the root of "key_dim" (both parts of a head count, as in the
            released models) or of "complex_dim", half of it.
        gate: "relu2" squares the parts of a gate unless both are negative, "swiglu" applies silu to them.
        sub_norms: Whether the inputs of output and down projections are normalized.
    """

    conjugate: bool = True
    score_scale: Literal["key_dim", "complex_dim"] = "key_dim"
    gate: Literal["relu2", "swiglu"] = "relu2"
    sub_norms: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "complex_layers")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: Dim of the residual stream.
        dense_ffn_dim: Hidden dim of the dense feed-forward layers and of those of the MTP heads.
        layers: The decoder layers.
        moe: The experts of the sparse layers (None without sparse layers).
        mtp: The MTP heads (None without MTP heads).
        norm_epsilon: Epsilon of every RMSNorm.
        value_scale: Factor of the values of every attention layer.
        attention_bias: Whether the projections of queries, keys and values have biases.
        tie_embeddings: Whether the output head shares the weight of the embedding.
        init_std: Standard deviation of the initial weights.
        max_positions: Maximum length of a sequence.
        family: Checkpoint layout: "mimo_v2_flash", or "mimo" for the dense MiMo-7B line.
        token_ids: Special token ids by their key in `config.json`.
        complex_layers: The settings of a model whose layers are complex-valued (None for a real model).
    """

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
    complex_layers: ComplexConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.complex_layers is not None:
            _check_complex(self)
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ConfigError(f"model.layers has {len(self.layers)} entries; it must have 1 to {MAX_LAYERS}.")
        for number, layer in enumerate(self.layers):
            _check_attention(layer.attention, f"layer {number}", self._source(number))
            if layer.ffn == "moe" and self.moe is None:
                raise ConfigError(f"layer {number} is 'moe', but the config describes no experts (moe is None).")
        if self.moe is not None:
            _check_moe(self.moe, sum(layer.ffn == "moe" for layer in self.layers))
        if self.mtp is not None:
            if self.mtp.attention.kv_from is not None:
                raise ConfigError(f"the MTP heads have kv_from {self.mtp.attention.kv_from}; they read their own keys.")
            _check_attention(self.mtp.attention, "the MTP heads", None)
        for name, ids in self.token_ids.items():
            for token_id in ids if isinstance(ids, list) else [ids]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ConfigError(f"{name} is {token_id}; the vocabulary has the ids 0 to {self.vocab_size - 1}.")

    @property
    def num_mtp_heads(self) -> int:
        """Number of prediction heads in addition to the output head."""
        return self.mtp.num_layers if self.mtp else 0

    @property
    def qkv_ranks(self) -> int:
        """Number of slices in which published checkpoints stack q, k and v: the key/value heads of a full layer."""
        full = [layer.attention for layer in self.layers if is_global(layer.attention)]
        return (full[0] if full else self.layers[0].attention).num_kv_heads

    def attention_layers(self) -> tuple[AttentionConfig, ...]:
        """Return the geometry of every attention layer, first of the main layers, then of the MTP heads."""
        heads = (self.mtp.attention,) * self.mtp.num_layers if self.mtp else ()
        return tuple(layer.attention for layer in self.layers) + heads

    def attention_place(self, index: int) -> AttentionPlace:
        """Return the arguments of the attention module of layer `index`; MTP head h is layer `len(layers) + h`."""
        if index < len(self.layers):
            spec = self.layers[index].attention
        else:
            assert self.mtp is not None, f"layer {index} of a model of {len(self.layers)} layers"
            spec = self.mtp.attention
        return AttentionPlace(
            spec=spec,
            index=index,
            hidden_size=self.hidden_size,
            bias=self.attention_bias,
            value_scale=self.value_scale,
            is_source=any(layer.attention.kv_from == index for layer in self.layers),
        )

    def _source(self, number: int) -> AttentionConfig | None:
        """Return the geometry of the layer whose keys layer `number` reads, or None.

        Raises:
            ConfigError: `kv_from` does not name an earlier layer with its own keys and the same geometry of keys.
        """
        spec = self.layers[number].attention
        if spec.kv_from is None:
            return None
        if spec.kv_from >= number:
            raise ConfigError(f"layer {number} has kv_from {spec.kv_from}; it must name an earlier layer.")
        source = self.layers[spec.kv_from].attention
        if source.kv_from is not None:
            raise ConfigError(
                f"layer {number} has kv_from {spec.kv_from}, but that layer reads the keys of layer {source.kv_from}; "
                "name a layer with its own keys."
            )
        for name in ("num_kv_heads", "key_dim", "value_dim", "rotary_dim", "rope_theta", "rope_scaling"):
            reader_value, source_value = getattr(spec, name), getattr(source, name)
            if reader_value != source_value:
                raise ConfigError(
                    f"layer {number} reads the keys of layer {spec.kv_from}, but its {name} is {reader_value} and that "
                    f"of the other {source_value}; they must be equal."
                )
        return source

    def local(self, *, tp: int) -> "ModelConfig":
        """Return the config of one rank of `tp` tensor-parallel ranks.

        A rank has num_heads / tp query heads of every layer and dense_ffn_dim / tp of every dense FFN; outputs are
        summed over ranks. Key/value heads are divided in the same way. If a layer has fewer than `tp` of them, a rank
        has one: rank r has head r * num_kv_heads // tp. Experts, embedding and output head are whole on every rank.

        Raises:
            ConfigError: A number is not divisible; the message names all such numbers.
        """
        if tp < 1:
            raise ConfigError(f"tp is {tp}; it must be at least 1.")
        if tp > 1 and self.complex_layers is not None:
            raise ConfigError("complex-valued layers cannot be divided among tensor-parallel ranks; set tp to 1.")
        layers = [(f"layer {number}", layer.attention) for number, layer in enumerate(self.layers)]
        layers += [("the layer of the MTP heads", self.mtp.attention)] if self.mtp else []
        problems = _grouped([(where, reason) for where, spec in layers for reason in _undivided(spec, tp)])
        if (self.mtp or any(layer.ffn == "dense" for layer in self.layers)) and self.dense_ffn_dim % tp:
            problems.append(f"dense_ffn_dim is {self.dense_ffn_dim}")
        if problems:
            raise ConfigError(
                f"the model cannot be divided among {tp} tensor-parallel ranks: {'; '.join(problems)}. Give a tp that "
                "divides these numbers."
            )
        return replace(
            self,
            dense_ffn_dim=max(self.dense_ffn_dim // tp, 1),
            layers=tuple(replace(layer, attention=local_heads(layer.attention, tp)) for layer in self.layers),
            mtp=replace(self.mtp, attention=local_heads(self.mtp.attention, tp)) if self.mtp else None,
        )

    def with_full_rope(self, theta: float | None, scaling: RopeScaling | None = None) -> "ModelConfig":
        """Return the model with another RoPE base and scaling in its full layers (None: unchanged)."""

        def changed(spec: AttentionConfig) -> AttentionConfig:
            if not is_global(spec):
                return spec
            return replace(
                spec,
                rope_theta=spec.rope_theta if theta is None else theta,
                rope_scaling=spec.rope_scaling if scaling is None else scaling,
            )

        layers = tuple(replace(layer, attention=changed(layer.attention)) for layer in self.layers)
        mtp = None if self.mtp is None else replace(self.mtp, attention=changed(self.mtp.attention))
        return replace(self, layers=layers, mtp=mtp)

    def with_mtp_heads(self, num_heads: int) -> "ModelConfig":
        """Return the same model with `num_heads` MTP heads. Raises ConfigError if the model has none to copy."""
        if self.mtp is None:
            raise ConfigError("the model has no MTP head to replicate; give its config an `mtp` entry.")
        return replace(self, mtp=replace(self.mtp, num_layers=num_heads))


def _grouped(problems: list[tuple[str, str]]) -> list[str]:
    """Return each reason once, as a clause with its first layer and the number of the others."""
    places: dict[str, list[str]] = {}
    for where, reason in problems:
        places.setdefault(reason, []).append(where)
    others = {reason: len(found) - 1 for reason, found in places.items()}
    return [
        f"{found[0]} {reason}" + (f" (and {others[reason]} more)" if others[reason] else "")
        for reason, found in places.items()
    ]


def _undivided(spec: AttentionConfig, tp: int) -> list[str]:
    """Return the head counts of a layer that cannot be divided among `tp` ranks, as predicates of a message."""
    problems = [f"has {spec.num_heads} heads"] if spec.num_heads % tp else []
    if tp > 1 and not attention_kind(spec.kind).divides_heads:
        problems.append(f"is {spec.kind!r}, a kind whose heads are not divided")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        problems.append(f"has {spec.num_kv_heads} key/value heads")
    return problems


def local_heads(spec: AttentionConfig, tp: int) -> AttentionConfig:
    """Return the geometry of one of `tp` tensor-parallel ranks; see `ModelConfig.local`."""
    return replace(spec, num_heads=spec.num_heads // tp, num_kv_heads=max(spec.num_kv_heads // tp, 1))


def _check_attention(attention: AttentionConfig, where: str, source: AttentionConfig | None) -> None:
    if attention.num_heads % attention.num_kv_heads:
        raise ConfigError(
            f"{where} has {attention.num_heads} heads, which {attention.num_kv_heads} key/value heads do not divide."
        )
    if attention.rotary_dim % 2 or attention.rotary_dim > attention.key_dim:
        raise ConfigError(
            f"{where} rotates {attention.rotary_dim} of {attention.key_dim} key dims; it must be even and no larger. "
            "It is int(key_dim x partial_rotary_factor)."
        )
    if attention.rotation.rotary_dim == 0 and attention.rope_scaling is not None:
        raise ConfigError(f"{where} rotates no dims, so rope_scaling has no effect; leave one of them out.")
    if reason := attention_kind(attention.kind).check(attention, source):
        raise ConfigError(f"{where} {reason}")


def _check_complex(config: ModelConfig) -> None:
    """Raise ConfigError if the dims are not pairs of real and imaginary parts, or a part has no complex form."""
    dims = {"hidden_size": config.hidden_size, "dense_ffn_dim": config.dense_ffn_dim}
    if config.moe is not None:
        dims["expert_dim"] = config.moe.expert_dim
    for spec in config.attention_layers():
        dims |= {"key_dim": spec.key_dim, "value_dim": spec.value_dim}
        if spec.kind not in ("full", "sliding") or spec.rotary_dim != spec.key_dim:
            raise ConfigError(
                f"complex_layers: a layer of kind {spec.kind!r} rotates {spec.rotary_dim} of {spec.key_dim} key dims; "
                "complex layers are full or sliding, and rotate all of them."
            )
    odd = [f"{name} {value}" for name, value in dims.items() if value % 2]
    if odd:
        raise ConfigError(f"complex_layers: {', '.join(odd)} must be even, a real and an imaginary part each.")
    if config.attention_bias or config.family != "mimo_v2_flash":
        raise ConfigError("complex_layers: there are no biases, and no such models in the family 'mimo'.")


def _check_moe(moe: MoEConfig, num_layers: int) -> None:
    if num_layers * moe.num_experts > MAX_EXPERTS:
        raise ConfigError(
            f"{num_layers} layers of {moe.num_experts} experts have more than {MAX_EXPERTS:,} experts in total."
        )
    if moe.experts_per_token > moe.num_experts:
        raise ConfigError(f"experts_per_token is {moe.experts_per_token}; it must be 1 to {moe.num_experts}.")
    if moe.num_experts % moe.num_groups or moe.groups_per_token > moe.num_groups:
        raise ConfigError(
            f"{moe.num_experts} experts cannot form {moe.num_groups} groups of which a token chooses "
            f"{moe.groups_per_token}."
        )
    group_size = moe.num_experts // moe.num_groups
    if moe.num_groups > 1 and (group_size < 2 or moe.groups_per_token * group_size < moe.experts_per_token):
        raise ConfigError(
            f"{moe.groups_per_token} groups of {group_size} experts are too few for {moe.experts_per_token} experts "
            "per token (a group has two or more)."
        )


def attention_parameters(config: ModelConfig, index: int) -> int:
    """Count the parameters of the attention module of layer `index`. MTP head h is layer `len(layers) + h`.

    A complex layer has half of the weights of this real one.
    """
    place = config.attention_place(index)
    return attention_kind(place.spec.kind).parameters(place)


def active_matmul_parameters(config: ModelConfig) -> int:
    """Count the active parameters of the main model's matrix products per token, without the embedding."""
    return _active(config, multiplied=1 if config.complex_layers is None else 2)


def _active(config: ModelConfig, *, multiplied: int) -> int:
    """Count the multiplications of the main model's matrix products per token, each weight of a layer `1/multiplied`.

    A parameter of a complex layer is multiplied twice, with a real and an imaginary part.
    """
    layers = (layer_multiplications(config, index, multiplied=multiplied) for index in range(len(config.layers)))
    return config.hidden_size * config.vocab_size + sum(layers)


def layer_multiplications(config: ModelConfig, index: int, *, multiplied: int = 1) -> int:
    """Count the multiplications of the matrix products of a main layer per token, each weight `1/multiplied`."""
    D, layer = config.hidden_size, config.layers[index]
    sinks = layer.attention.num_heads if layer.attention.sink else 0
    total = sinks + (attention_parameters(config, index) - sinks) // multiplied
    if layer.ffn == "dense":
        return total + 3 * D * config.dense_ffn_dim // multiplied
    assert config.moe is not None, "checked by the config"
    experts = config.moe.experts_per_token * 3 * D * config.moe.expert_dim
    return total + D * config.moe.num_experts + experts // multiplied


def mtp_matmul_parameters(config: ModelConfig) -> int:
    """Count the multiplications of all MTP heads per token. Each head has its own pass through the output head.

    They are the active parameters of real layers, and twice those of complex ones.
    """
    if config.mtp is None:
        return 0
    D = config.hidden_size
    block = 2 * D * D + attention_parameters(config, len(config.layers)) + 3 * D * config.dense_ffn_dim
    return config.mtp.num_layers * (block + D * config.vocab_size)


def attention_flops_per_token(spec: AttentionConfig, length: int) -> float:
    """Count the forward FLOPs of a layer's scores and weighted values, averaged over the positions of a sequence."""
    return (
        2
        * spec.num_heads
        * (spec.key_dim + spec.value_dim)
        * attention_kind(spec.kind).visible_keys(spec, length)
        / length
    )


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """Count the FLOPs of one token in a training step: three times the forward pass, including MTP heads."""
    matmul = 2 * (_active(config, multiplied=1) + mtp_matmul_parameters(config))
    attention = sum(attention_flops_per_token(spec, length) for spec in config.attention_layers())
    return 3 * (matmul + attention)
