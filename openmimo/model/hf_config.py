"""Read and write `config.json`, without torch.

Two dialects are read: the hub's (`hybrid_layer_pattern`, `swa_*`, `layernorm_epsilon`, ...) and that of the native
transformers class (`layer_types`, `rope_parameters`, `rms_norm_eps`, ...). A file may mix them if they agree. Unknown
keys and contradictory keys are a ConfigError that names them. Written files have the keys of both dialects, so that
transformers, the hub's remote code and this package read the same model.

A model with sparse layers is written in a third layout, `model_type: openmimo`, which states the `ModelConfig` itself.
transformers and serving engines do not know this type and refuse the file, instead of computing another model.

Implementations disagree on whether `sliding_window_size: 128` lets a query see 128 or 129 keys, its own included
(docs/model.md). If `window_keys`, a key of this package, is in the file, it decides. Otherwise a native
`sliding_window: n` means n keys, and a hub `sliding_window_size: n` means n + 1, as in transformers (5.20 and later)
and SGLang.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeFloat, PositiveFloat, checked
from openmimo.core.files import read_known_keys
from openmimo.model.attention import AttentionConfig, Factor, HeadCount, Positions, RopeScaling, RopeTheta, Size
from openmimo.model.config import (
    ComplexConfig,
    Epsilon,
    LayerConfig,
    LayerCount,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    MTPHeadCount,
    Scale,
    VocabSize,
)

ARCHITECTURES = {"mimo_v2_flash": "MiMoV2FlashForCausalLM", "mimo": "MiMoForCausalLM"}

OWN_TYPE, OWN_ARCHITECTURE = "openmimo", "OpenMiMoForCausalLM"
_KINDS = ("full", "sliding")  # the attention kinds that `layer_types` can name
_OWN_KINDS = (*_KINDS, "sparse")  # those of the layout `openmimo`; a file never names code of other packages
_TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of transformers and the hub that do not affect the computation; they are ignored.
_INERT_KEYS = {
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache", "output_router_logits",
    "_name_or_path", "hybrid_block_size", "attention_chunk_size", "max_window_layers", "chunk_size_feed_forward",
    "id2label", "label2id", "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "router_aux_loss_coef", "openmimo_version",
}  # fmt: skip
_LayerKind = TypeVar("_LayerKind", bound=str)
_RopeType: TypeAlias = Literal["default", "linear", "yarn", "longrope", "dynamic", "alibi"]
RotaryShare = Annotated[float, Bounds(least=0, most=1)]


@dataclass(frozen=True)
class _Rope:
    """One entry of `rope_parameters`, for all layers or for one kind of layer; or the older `rope_scaling`."""

    rope_type: _RopeType | None = None
    type: _RopeType | None = None
    rope_theta: RopeTheta | None = None
    partial_rotary_factor: RotaryShare | None = None
    factor: Factor | None = None
    original_max_position_embeddings: Positions | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    truncate: Literal[True] | None = None
    short_factor: tuple[Factor, ...] | None = None
    long_factor: tuple[Factor, ...] | None = None

    @property
    def kind(self) -> _RopeType:
        """The type under either of its keys."""
        return _or(self.rope_type, _or(self.type, "default"))


@dataclass(frozen=True)
class _RopeByKind(_Rope):
    """`rope_parameters`, flat or by kind of layer."""

    full_attention: _Rope | None = None
    sliding_attention: _Rope | None = None


@dataclass(frozen=True)
class _Quantization:
    """The keys of `quantization_config` that determine the decoding; other keys list tensors that are not quantized."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] | None = None
    weight_block_size: tuple[Literal[128], Literal[128]] | None = None


@dataclass(frozen=True)
class PackedConfig:
    """`quantization_config` of a checkpoint whose weights are packed (`kernels/weights.py`).

    Attributes:
        quant_method: The name of the method.
        format: A packed format.
        stages: Number of stages.
        scales: Scales of a whole matrix or of each row.
    """

    quant_method: Literal["openmimo_packed"]
    format: Literal["fairy2i", "fairy", "ternary", "binary"]
    stages: Annotated[int, Bounds(least=1, most=4)] = 1
    scales: Literal["tensor", "row"] = "tensor"


def packed_config(values: dict[str, Any], where: str) -> PackedConfig | None:
    """Return how the weights of a checkpoint with this `config.json` are packed; None if they are not."""
    entry = values.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != "openmimo_packed":
        return None
    return read_known_keys(PackedConfig, entry, f"{where}: quantization_config")


@dataclass(frozen=True)
class _HubConfig:
    """All keys of `config.json` that are read, of both dialects. None: the key is absent or null."""

    model_type: Literal["mimo_v2_flash", "mimo"]
    vocab_size: VocabSize
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: LayerCount
    num_attention_heads: HeadCount
    num_key_value_heads: HeadCount
    head_dim: Size | None = None
    v_head_dim: Size | None = None
    rope_theta: RopeTheta | None = None
    swa_num_attention_heads: HeadCount | None = None
    swa_num_key_value_heads: HeadCount | None = None
    swa_head_dim: Size | None = None
    swa_v_head_dim: Size | None = None
    swa_rope_theta: RopeTheta | None = None
    rope_parameters: _RopeByKind | None = None
    rope_scaling: _Rope | None = None
    partial_rotary_factor: RotaryShare | None = None
    attention_bias: bool | None = None
    attention_dropout: Annotated[float, Bounds(least=0, most=0)] | None = None
    attention_value_scale: Scale | None = None
    attention_projection_layout: Literal["split", "fused_qkv"] | None = None
    add_swa_attention_sink_bias: bool | None = None
    add_full_attention_sink_bias: bool | None = None
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    hybrid_layer_pattern: tuple[Literal[0, 1], ...] | None = None
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    moe_layer_freq: tuple[Literal[0, 1], ...] | None = None
    sliding_window: Positions | None = None
    sliding_window_size: Positions | None = None
    window_keys: Positions | None = None
    use_sliding_window: Literal[False] | None = None
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Epsilon | None = None
    layernorm_epsilon: Epsilon | None = None
    initializer_range: NonNegativeFloat | None = None
    max_position_embeddings: Positions | None = None
    tie_word_embeddings: bool | None = None
    moe_intermediate_size: Size | None = None
    n_routed_experts: Size | None = None
    num_local_experts: Size | None = None
    num_experts_per_tok: Size | None = None
    n_shared_experts: Literal[0] | None = None
    scoring_func: Literal["sigmoid"] | None = None
    topk_method: Literal["noaux_tc"] | None = None
    n_group: Size | None = None
    topk_group: Size | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: Scale | None = None
    moe_router_dtype: Literal["float32"] | None = None
    num_nextn_predict_layers: MTPHeadCount | Literal[0] | None = None
    mtp_hidden: Literal["pre_norm", "post_norm"] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    quantization_config: dict[str, Any] | None = None
    complex_layers: ComplexConfig | None = None


def config_from_hf(
    values: dict[str, Any],
    *,
    where: str = "config.json",
    window_keys: int | None = None,
    num_mtp_heads: int | None = None,
) -> ModelConfig:
    """Convert a `config.json` of either dialect to a model config.

    Args:
        values: The parsed file.
        where: Name of the file in messages.
        window_keys: Overrides the window of the sliding layers.
        num_mtp_heads: Overrides the number of MTP heads, which the hub's V2-Flash config does not state. The tensors of
            the checkpoint determine it.

    Raises:
        ConfigError: The message names `where` and all keys with a wrong type or value.
    """
    if values.get("model_type") == OWN_TYPE:
        return _from_own_layout(values, where, window_keys, num_mtp_heads)
    if "speech_vocab_size" in values:
        raise ConfigError(
            f"{where} describes an audio language model; load it with openmimo.model.audio.language.load_audio_model."
        )
    hub = read_known_keys(_HubConfig, values, where, inert=_INERT_KEYS)
    if hub.quantization_config is not None and packed_config(values, where) is None:
        _check_quantization(hub.quantization_config, where)
    token_ids = {key: values[key] for key in _TOKEN_ID_KEYS if key in values}
    try:
        return _Reader(hub).model_config(window_keys, num_mtp_heads, token_ids)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_quantization(values: dict[str, Any] | None, where: str) -> None:
    if values is not None:
        read_known_keys(_Quantization, values, f"{where}: quantization_config")


@dataclass(frozen=True)
class _OwnLayout:
    """The keys of a `config.json` in the layout `openmimo`."""

    model_type: Literal["openmimo"]
    model: dict[str, Any]
    num_nextn_predict_layers: MTPHeadCount | Literal[0]
    dtype: str | None = None
    attention_projection_layout: Literal["split", "fused_qkv"] | None = None
    quantization_config: dict[str, Any] | None = None


def _from_own_layout(
    values: dict[str, Any], where: str, window_keys: int | None, num_mtp_heads: int | None
) -> ModelConfig:
    stated = read_known_keys(_OwnLayout, values, where, inert={"architectures", "openmimo_version"})
    _check_quantization(stated.quantization_config, where)
    if window_keys is not None:
        raise ConfigError(
            f"{where}: window_keys {window_keys} is given, but the layout 'openmimo' states every window."
        )
    for kind in _named_kinds(stated.model):
        if kind not in _OWN_KINDS:
            raise ConfigError(f"{where}: attention kind {kind!r}; the layout 'openmimo' has {', '.join(_OWN_KINDS)}.")
    config: ModelConfig = checked(ModelConfig, stated.model, f"{where}: model")
    if num_mtp_heads is None or num_mtp_heads == config.num_mtp_heads:
        return config
    return config.with_mtp_heads(num_mtp_heads) if num_mtp_heads else replace(config, mtp=None)


def _named_kinds(values: Any) -> Iterator[Any]:
    """Yield every value of a key `kind`, at any depth."""
    if isinstance(values, dict):
        if "kind" in values:
            yield values["kind"]
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _named_kinds(value)


class _Reader:
    """Converts the keys of one `config.json`, with the fallbacks between its two dialects."""

    def __init__(self, hub: _HubConfig):
        self.hub = hub

    def model_config(
        self, window_keys: int | None, num_mtp_heads: int | None, token_ids: dict[str, Any]
    ) -> ModelConfig:
        hub = self.hub
        kinds = self.attention_kinds()
        if window_keys is not None and "sliding" not in kinds:
            raise ConfigError(f"there is no sliding layer, so window_keys {window_keys} would have no effect.")
        sliding_window = self.window_keys() if window_keys is None else window_keys
        geometry = {"full": self.attention("full", None)}
        if "sliding" in kinds or hub.model_type != "mimo":
            geometry["sliding"] = self.attention("sliding", sliding_window)
        layers = tuple(
            LayerConfig(attention=geometry[kind], ffn=ffn) for kind, ffn in zip(kinds, self.ffn_kinds(), strict=True)
        )
        heads = num_mtp_heads if num_mtp_heads is not None else hub.num_nextn_predict_layers or 0
        default_hidden = "post_norm" if hub.model_type == "mimo" else "pre_norm"
        mtp_attention = geometry["full" if _mtp_is_full(hub.model_type, kinds) else "sliding"]
        return ModelConfig(
            vocab_size=hub.vocab_size,
            hidden_size=hub.hidden_size,
            dense_ffn_dim=hub.intermediate_size,
            layers=layers,
            moe=self.moe() if any(layer.ffn == "moe" for layer in layers) else None,
            mtp=MTPConfig(heads, mtp_attention, _or(hub.mtp_hidden, default_hidden)) if heads else None,
            norm_epsilon=_or(self.agreed("layernorm_epsilon", "rms_norm_eps"), 1e-5),
            value_scale=_or(hub.attention_value_scale, 1.0),
            attention_bias=_or(hub.attention_bias, False),
            tie_embeddings=_or(hub.tie_word_embeddings, False),
            init_std=_or(hub.initializer_range, 0.02),
            max_positions=_or(hub.max_position_embeddings, 32768),
            family=hub.model_type,
            token_ids=token_ids,
            complex_layers=hub.complex_layers,
        )

    def agreed(self, *keys: str) -> Any:
        """Return the value under one of several synonymous keys, or None. Raises ConfigError if two disagree."""
        found = {key: value for key in keys if (value := getattr(self.hub, key)) is not None}
        if len(set(found.values())) > 1:
            raise ConfigError(f"{' and '.join(f'{key} {value!r}' for key, value in found.items())} must agree.")
        return next(iter(found.values()), None)

    def attention_kinds(self) -> tuple[str, ...]:
        return self._layers(
            {"hybrid_layer_pattern": {0: "full", 1: "sliding"},
             "layer_types": {"full_attention": "full", "sliding_attention": "sliding"}},
            "full",
        )  # fmt: skip

    def ffn_kinds(self) -> tuple[Literal["dense", "moe"], ...]:
        return self._layers(
            {"moe_layer_freq": {0: "dense", 1: "moe"}, "mlp_layer_types": {"dense": "dense", "sparse": "moe"}}, "dense"
        )

    def _layers(self, keys: dict[str, dict[Any, _LayerKind]], mimo_7b_kind: _LayerKind) -> tuple[_LayerKind, ...]:
        """Return the kind of each layer.

        Args:
            keys: Synonymous keys of the file, each with the kinds that its entries mean.
            mimo_7b_kind: The kind of all layers of a MiMo-7B file, which has none of these keys.
        """
        stated = {
            key: tuple(names[value] for value in values)
            for key, names in keys.items()
            if (values := getattr(self.hub, key)) is not None
        }
        count = self.hub.num_hidden_layers
        if not stated:
            if self.hub.model_type != "mimo":
                raise ConfigError(
                    f"neither {' nor '.join(keys)} is present; one of them must list the kinds of layers."
                )
            return (mimo_7b_kind,) * count
        if len(set(stated.values())) > 1:
            raise ConfigError(f"{' and '.join(stated)} name different layers.")
        kinds = next(iter(stated.values()))
        if len(kinds) != count:
            raise ConfigError(f"{' and '.join(stated)} has {len(kinds)} entries, but num_hidden_layers is {count}.")
        return kinds

    def window_keys(self) -> int | None:
        size, native = self.hub.sliding_window_size, self.hub.sliding_window
        if size is not None and native is not None and native not in (size, size + 1):
            raise ConfigError(
                f"sliding_window {native} and sliding_window_size {size} must be equal or differ by the query itself."
            )
        if self.hub.window_keys is not None:
            return self.hub.window_keys
        return native if size is None else size + 1

    def attention(self, kind: str, window_keys: int | None) -> AttentionConfig:
        hub, is_sliding = self.hub, kind == "sliding"
        num_heads, key_dim, value_dim = hub.num_attention_heads, hub.head_dim, hub.v_head_dim
        kv_heads = hub.num_key_value_heads
        if is_sliding:
            num_heads = _or(hub.swa_num_attention_heads, num_heads)
            key_dim = _or(hub.swa_head_dim, key_dim)
            value_dim = _or(hub.swa_v_head_dim, _or(hub.swa_head_dim, value_dim))
            # The native class has no such key and gives sliding layers twice the key/value heads of full layers.
            kv_heads = _or(hub.swa_num_key_value_heads, 2 * kv_heads)
        key_dim = _or(key_dim, hub.hidden_size // hub.num_attention_heads)
        theta, factor, scaling = self._rope(kind)
        sink = hub.add_swa_attention_sink_bias if is_sliding else hub.add_full_attention_sink_bias
        return AttentionConfig(
            kind="alibi" if self._nested_rope(kind).kind == "alibi" else kind,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            key_dim=key_dim,
            value_dim=_or(value_dim, key_dim),
            rotary_dim=int(key_dim * factor),
            rope_theta=theta,
            window_keys=window_keys,
            sink=_or(sink, is_sliding and hub.model_type == "mimo_v2_flash"),
            rope_scaling=scaling,
        )

    def _rope(self, kind: str) -> tuple[float, float, RopeScaling | None]:
        """Return RoPE base, rotated fraction and scaling of one kind of layer, from flat keys or `rope_parameters`."""
        hub, nested = self.hub, self._nested_rope(kind)
        flat = hub.swa_rope_theta if kind == "sliding" else hub.rope_theta
        if None not in (flat, nested.rope_theta) and flat != nested.rope_theta:
            raise ConfigError(f"RoPE base {flat} and {nested.rope_theta} (rope_parameters) for {kind} layers.")
        factors = (nested.partial_rotary_factor, hub.partial_rotary_factor)
        if None not in factors and factors[0] != factors[1]:
            raise ConfigError(f"partial_rotary_factor {factors[1]} and {factors[0]} (rope_parameters) must agree.")
        theta = _or(flat, nested.rope_theta)
        if theta is None:
            raise ConfigError(f"no RoPE base for {kind} layers is stated (rope_theta or rope_parameters).")
        scaling = self._rope_scaling(nested)
        flat_scaling = scaling if hub.rope_scaling is None else self._rope_scaling(hub.rope_scaling)
        if None not in (scaling, flat_scaling) and scaling != flat_scaling:
            raise ConfigError(f"rope_scaling and rope_parameters for {kind} layers must agree.")
        return theta, _or(factors[0], _or(factors[1], 1.0)), _or(scaling, flat_scaling)

    def _nested_rope(self, kind: str) -> _Rope:
        """Return the entry of `rope_parameters` of one kind of layer."""
        by_kind = self.hub.rope_parameters or _RopeByKind()
        return (by_kind.sliding_attention if kind == "sliding" else by_kind.full_attention) or by_kind

    def _rope_scaling(self, rope: _Rope) -> RopeScaling | None:
        """Return the scaling that an entry describes with the keys of transformers."""
        if rope.kind in ("default", "alibi"):
            return None
        if rope.kind == "dynamic":
            raise ConfigError(
                "RoPE of type 'dynamic' depends on the length of a text, which a cache of rotated keys cannot follow. "
                "Raise rope_theta instead (NTK-aware scaling), or use 'yarn'."
            )
        positions = _or(self.hub.max_position_embeddings, 32768)
        original = _or(rope.original_max_position_embeddings, positions)
        if rope.kind == "longrope":
            divisors = rope.long_factor if positions > original else rope.short_factor
            if divisors is None:
                raise ConfigError("RoPE of type 'longrope' needs short_factor and long_factor.")
            return RopeScaling(
                "longrope",
                _or(rope.factor, max(positions / original, 1.0)),
                original,
                divisors=divisors,
                amplitude=rope.attention_factor,
            )
        if rope.factor is None:
            raise ConfigError(f"RoPE of type {rope.kind!r} needs a factor.")
        if rope.kind == "linear":
            return RopeScaling("linear", rope.factor)
        return RopeScaling(
            "yarn",
            rope.factor,
            original,
            beta_fast=_or(rope.beta_fast, 32.0),
            beta_slow=_or(rope.beta_slow, 1.0),
            amplitude=_yarn_amplitude(rope),
        )

    def moe(self) -> MoEConfig:
        hub, experts = self.hub, self.agreed("n_routed_experts", "num_local_experts")
        needed = {
            "n_routed_experts": experts,
            "num_experts_per_tok": hub.num_experts_per_tok,
            "moe_intermediate_size": hub.moe_intermediate_size,
        }
        lacking = [key for key, value in needed.items() if value is None]
        if lacking:
            raise ConfigError(f"there are sparse layers, but {', '.join(lacking)} is missing.")
        assert hub.num_experts_per_tok is not None and hub.moe_intermediate_size is not None
        return MoEConfig(
            num_experts=experts,
            experts_per_token=hub.num_experts_per_tok,
            expert_dim=hub.moe_intermediate_size,
            num_groups=_or(hub.n_group, 1),
            groups_per_token=_or(hub.topk_group, 1),
            normalize_weights=_or(hub.norm_topk_prob, True),
            routed_scale=_or(hub.routed_scaling_factor, 1.0),
        )


def _yarn_amplitude(rope: _Rope) -> float | None:
    """Return the stated amplitude, or the one that `mscale` and `mscale_all_dim` state together (DeepSeek)."""
    if rope.attention_factor is not None or rope.mscale is None or rope.mscale_all_dim is None:
        return rope.attention_factor
    logarithm = math.log(rope.factor or 1.0)
    return (0.1 * rope.mscale * logarithm + 1.0) / (0.1 * rope.mscale_all_dim * logarithm + 1.0)


def _hub_kind(spec: AttentionConfig) -> str:
    """Return the kind in `layer_types`. ALiBi layers are full layers whose `rope_type` is "alibi"."""
    return "full" if spec.kind == "alibi" else spec.kind


def _rope_keys(spec: AttentionConfig) -> dict[str, Any]:
    """Return the entry of `rope_parameters` of a layer. NTK-aware scaling is a raised base."""
    values: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _written_theta(spec),
        "partial_rotary_factor": _rotary_factor(spec),
    }
    if spec.kind == "alibi":
        return values | {"rope_type": "alibi"}
    scaling = spec.rope_scaling
    if scaling is None or scaling.kind in ("none", "ntk"):
        return values
    values |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.original_positions is not None:
        values["original_max_position_embeddings"] = scaling.original_positions
    if scaling.amplitude is not None:
        values["attention_factor"] = scaling.amplitude
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if scaling.kind == "longrope":
        # one set of divisors for every length, because the cache holds rotated keys
        values |= {"short_factor": list(scaling.divisors), "long_factor": list(scaling.divisors)}
    return values


def _written_theta(spec: AttentionConfig) -> float:
    if spec.rope_scaling is None or spec.rope_scaling.kind != "ntk":
        return spec.rope_theta
    return spec.rope_theta * spec.rope_scaling.factor ** (spec.rotary_dim / max(spec.rotary_dim - 2, 1))


def config_to_hf(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """Return the `config.json` of a model, with the keys of both dialects.

    The native transformers class derives sinks and sliding geometry from the layer kind. A model that it would silently
    compute wrongly is written with an unknown architecture, so that transformers refuses to load it.

    Raises:
        ConfigError: `config.json` cannot express the geometry of the model.
    """
    if any(spec.kind == "sparse" for spec in config.attention_layers()):
        return _to_own_layout(config, dtype)
    kinds = {_hub_kind(layer.attention): layer.attention for layer in config.layers}
    if config.mtp:
        kinds.setdefault(_hub_kind(config.mtp.attention), config.mtp.attention)
    _refuse_mixed_geometry(config, kinds)
    reference = kinds.get("full") or kinds["sliding"]
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family] if _native_class_agrees(config, kinds) else OWN_ARCHITECTURE],
        "model_type": config.family,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_ffn_dim,
        "num_hidden_layers": len(config.layers),
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "rms_norm_eps": config.norm_epsilon,
        "num_attention_heads": reference.num_heads,
        "num_key_value_heads": reference.num_kv_heads,
        "head_dim": reference.key_dim,
        "v_head_dim": reference.value_dim,
        "num_nextn_predict_layers": config.num_mtp_heads,
        **config.token_ids,
    }
    if config.mtp:
        values["mtp_hidden"] = config.mtp.hidden
    if config.complex_layers:
        values["complex_layers"] = asdict(config.complex_layers)
    if config.family == "mimo":
        rope = _rope_keys(reference)
        values["rope_theta"] = rope.pop("rope_theta")
        values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if rope["rope_type"] != "default":
            values["rope_scaling"] = rope
        return values
    return values | _hybrid_keys(config, kinds, reference)


def _to_own_layout(config: ModelConfig, dtype: str) -> dict[str, Any]:
    for spec in config.attention_layers():
        if spec.kind not in _OWN_KINDS:
            raise ConfigError(
                f"an attention layer of kind {spec.kind!r} cannot be saved: config.json states the kinds "
                f"{', '.join(_OWN_KINDS)}."
            )
    return {
        "architectures": [OWN_ARCHITECTURE],
        "model_type": OWN_TYPE,
        "dtype": dtype,
        "num_nextn_predict_layers": config.num_mtp_heads,
        "model": asdict(config),
    }


def _hybrid_keys(config: ModelConfig, kinds: dict[str, AttentionConfig], reference: AttentionConfig) -> dict[str, Any]:
    full, sliding = kinds.get("full", reference), kinds.get("sliding", reference)
    values: dict[str, Any] = {
        "layernorm_epsilon": config.norm_epsilon,
        "attention_value_scale": config.value_scale,
        "rope_parameters": {"full_attention": _rope_keys(full), "sliding_attention": _rope_keys(sliding)},
        "rope_theta": _written_theta(full),
        "swa_rope_theta": _written_theta(sliding),
        "swa_num_attention_heads": sliding.num_heads,
        "swa_num_key_value_heads": sliding.num_kv_heads,
        "swa_head_dim": sliding.key_dim,
        "swa_v_head_dim": sliding.value_dim,
        "layer_types": [f"{_hub_kind(layer.attention)}_attention" for layer in config.layers],
        "hybrid_layer_pattern": [int(layer.attention.kind == "sliding") for layer in config.layers],
        "mlp_layer_types": ["sparse" if layer.ffn == "moe" else "dense" for layer in config.layers],
        "moe_layer_freq": [int(layer.ffn == "moe") for layer in config.layers],
        "add_swa_attention_sink_bias": sliding.sink if "sliding" in kinds else True,
        "add_full_attention_sink_bias": full.sink,
    }
    if sliding.window_keys is not None:
        values |= {"sliding_window": sliding.window_keys, "window_keys": sliding.window_keys}
    if config.moe:
        values |= {
            "n_routed_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.experts_per_token,
            "moe_intermediate_size": config.moe.expert_dim,
            "n_group": config.moe.num_groups,
            "topk_group": config.moe.groups_per_token,
            "norm_topk_prob": config.moe.normalize_weights,
            "routed_scaling_factor": config.moe.routed_scale,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }
    return values


def _native_class_agrees(config: ModelConfig, kinds: dict[str, AttentionConfig]) -> bool:
    """Return whether the native transformers class, which has one geometry per model, computes this model correctly."""
    if config.complex_layers is not None:
        return False
    if config.family != "mimo_v2_flash":
        return True
    full, sliding = kinds.get("full"), kinds.get("sliding")
    if any(spec.rotary_dim == 0 for spec in kinds.values()):
        return False
    if full is not None and full.sink:
        return False
    if sliding is None or "sliding" not in {layer.attention.kind for layer in config.layers}:
        return True
    if full is None or not sliding.sink:
        return False
    same_dims = (full.num_heads, full.key_dim, full.value_dim) == (
        sliding.num_heads,
        sliding.key_dim,
        sliding.value_dim,
    )
    return same_dims and sliding.num_kv_heads == 2 * full.num_kv_heads


def _refuse_mixed_geometry(config: ModelConfig, kinds: dict[str, AttentionConfig]) -> None:
    for kind, spec in kinds.items():
        if _hub_kind(spec) not in _KINDS or spec.score_block is not None:
            raise ConfigError(
                f"an attention layer of kind {kind!r} with score_block {spec.score_block} cannot be saved: config.json "
                f"states the kinds {' and '.join(_KINDS)}, without block scores."
            )
    for number, layer in enumerate(config.layers):
        if layer.attention != kinds[_hub_kind(layer.attention)]:
            raise ConfigError(
                f"layer {number} has a different geometry; config.json can state one for each kind of layer."
            )
    if config.mtp and config.mtp.attention != kinds["full" if _mtp_is_full(config.family, kinds) else "sliding"]:
        raise ConfigError("the MTP heads have a different geometry; config.json gives them that of a kind of layer.")


def _mtp_is_full(family: str, kinds: Iterable[str]) -> bool:
    """Return whether MTP heads are full layers: they are sliding layers if the model has any."""
    return family == "mimo" or "sliding" not in kinds


def _rotary_factor(spec: AttentionConfig) -> float:
    """Return a fraction of the key dims that truncates to `rotary_dim`: 1, the published 0.334, or another."""
    if spec.rotary_dim in (0, spec.key_dim):
        return spec.rotary_dim / spec.key_dim
    return 0.334 if int(spec.key_dim * 0.334) == spec.rotary_dim else (spec.rotary_dim + 0.5) / spec.key_dim


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
