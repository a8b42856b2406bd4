"""`config.json`, both ways, without torch.

Two dialects are read: the hub's (`hybrid_layer_pattern`, `swa_*`, `layernorm_epsilon`, ...) and the one that the native
transformers class writes (`layer_types`, `rope_parameters`, `rms_norm_eps`, ...). A file may mix them as long as they
agree. A key that nobody reads, or two that contradict each other, is a ConfigError that names it. We write both
dialects at once, so that transformers, the hub's remote code and we read the same model from one file.

The window. Implementations differ on whether `sliding_window_size: 128` shows a query 128 keys or 129, itself included
(docs/model.md). `window_keys`, our own key, decides where it stands; else a native `sliding_window: n` means n keys,
and a hub `sliding_window_size: n` means n + 1, as transformers (5.20 and later) and SGLang read it.
"""

from collections.abc import Iterable
from typing import Any

from openmimo.core.errors import ConfigError
from openmimo.core.fields import unknown_key_message
from openmimo.model.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, MTPConfig

ARCHITECTURES = {"mimo_v2_flash": "MiMoV2FlashForCausalLM", "mimo": "MiMoForCausalLM"}

_TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GEOMETRY_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim", "rope_theta")
_SLIDING_KEYS = tuple(f"swa_{key}" for key in _GEOMETRY_KEYS)
_READ_KEYS = {
    *_TOKEN_ID_KEYS, *_GEOMETRY_KEYS, *_SLIDING_KEYS,
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
    "max_position_embeddings", "initializer_range", "tie_word_embeddings", "attention_bias", "attention_dropout",
    "rms_norm_eps", "layernorm_epsilon", "attention_value_scale", "rope_parameters", "rope_scaling",
    "partial_rotary_factor", "layer_types", "hybrid_layer_pattern", "mlp_layer_types", "moe_layer_freq",
    "sliding_window", "sliding_window_size", "window_keys", "add_swa_attention_sink_bias",
    "add_full_attention_sink_bias", "moe_intermediate_size", "n_routed_experts", "num_local_experts",
    "num_experts_per_tok", "n_shared_experts", "scoring_func", "topk_method", "n_group", "topk_group",
    "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers", "mtp_hidden", "quantization_config",
    "attention_projection_layout", "moe_router_dtype", "use_sliding_window",
}  # fmt: skip
# Bookkeeping of transformers and the hub that says nothing about the computation.
_INERT_KEYS = {
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache", "output_router_logits",
    "_name_or_path", "hybrid_block_size", "attention_chunk_size", "max_window_layers", "chunk_size_feed_forward",
    "id2label", "label2id", "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "router_aux_loss_coef", "openmimo_version",
}  # fmt: skip


def config_from_hf(
    values: dict[str, Any],
    *,
    where: str = "config.json",
    window_keys: int | None = None,
    num_mtp_heads: int | None = None,
) -> ModelConfig:
    """Reads a `config.json`, in either dialect.

    window_keys overrides the window of the sliding layers. num_mtp_heads overrides the number of heads, which the hub's
    V2-Flash config does not state (the checkpoint's index does). Raises ConfigError.
    """
    reader = _Reader(values, where)
    reader.refuse_unknown_keys()
    reader.refuse_unsupported_values()
    family = values["model_type"]
    kinds = reader.attention_kinds()
    if window_keys is not None and "sliding" not in kinds:
        raise ConfigError(f"{where} has no sliding layer, so window_keys {window_keys} would have no effect.")
    sliding_window = reader.window_keys() if window_keys is None else window_keys
    full = reader.attention("full", None)
    sliding = reader.attention("sliding", sliding_window) if "sliding" in kinds or family != "mimo" else None
    layers = tuple(
        LayerConfig(attention=full if kind == "full" else sliding, ffn=ffn)
        for kind, ffn in zip(kinds, reader.ffn_kinds(), strict=True)
    )
    heads = num_mtp_heads if num_mtp_heads is not None else int(values.get("num_nextn_predict_layers") or 0)
    default_hidden = "post_norm" if family == "mimo" else "pre_norm"
    mtp_attention = full if _mtp_is_full(family, kinds) else sliding
    mtp = MTPConfig(heads, mtp_attention, values.get("mtp_hidden", default_hidden)) if heads else None
    return ModelConfig(
        vocab_size=reader.required("vocab_size"),
        hidden_size=reader.required("hidden_size"),
        dense_ffn_dim=reader.required("intermediate_size"),
        layers=layers,
        moe=reader.moe() if any(layer.ffn == "moe" for layer in layers) else None,
        mtp=mtp,
        norm_epsilon=reader.agreed(("layernorm_epsilon", "rms_norm_eps"), 1e-5),
        value_scale=_or(values.get("attention_value_scale"), 1.0),
        attention_bias=bool(values.get("attention_bias", False)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        init_std=values.get("initializer_range", 0.02),
        max_positions=values.get("max_position_embeddings", 32768),
        family=family,
        token_ids={key: values[key] for key in _TOKEN_ID_KEYS if key in values},
    )


class _Reader:
    """Looks keys up in one `config.json`, with the fallbacks between its two dialects."""

    def __init__(self, values: dict[str, Any], where: str):
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must hold a JSON object.")
        self.values = values
        self.where = where

    def refuse_unknown_keys(self) -> None:
        for key in self.values:
            if key not in _READ_KEYS and key not in _INERT_KEYS:
                raise ConfigError(
                    unknown_key_message(key, _READ_KEYS, self.where)
                    + ". Remove it if it changes nothing; a key that is ignored may be a model that is silently wrong."
                )

    def refuse_unsupported_values(self) -> None:
        quantisation = self.values.get("quantization_config")
        if quantisation is not None and (
            quantisation.get("quant_method") != "fp8" or quantisation.get("weight_block_size") != [128, 128]
        ):
            raise ConfigError(f"{self.where}: of quantised checkpoints only FP8 in 128 x 128 blocks can be read.")
        if self.values.get("model_type") not in ARCHITECTURES:
            raise ConfigError(
                f"{self.where} has model_type {self.values.get('model_type')!r}; known are {', '.join(ARCHITECTURES)}."
            )
        allowed = {
            "hidden_act": ("silu",),
            "scoring_func": (None, "sigmoid"),
            "topk_method": (None, "noaux_tc"),
            "n_shared_experts": (None, 0),
            "rope_scaling": (None,),
            "attention_dropout": (0, 0.0, None),
            "attention_projection_layout": (None, "split", "fused_qkv"),
            "moe_router_dtype": (None, "float32"),
            "use_sliding_window": (None, False),
        }
        for key, good in allowed.items():
            if self.values.get(key, good[0]) not in good:
                raise ConfigError(f"{self.where} has {key} {self.values[key]!r}; supported is {good[-1]!r} only.")

    def required(self, key: str) -> int:
        """A number that the model cannot be built without."""
        value = self.values.get(key)
        if value is None:
            raise ConfigError(f"{self.where} lacks {key!r}, which the model cannot be built without.")
        return self._whole(key, value)

    def _whole(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.where} has {key} {value!r}; it must be a whole number of 1 or more.")
        return value

    def agreed(self, keys: tuple[str, ...], default: Any) -> Any:
        """The value under any of several names of one thing; two that differ are an error."""
        found = {key: self.values[key] for key in keys if self.values.get(key) is not None}
        if len(set(map(str, found.values()))) > 1:
            raise ConfigError(f"{self.where} contradicts itself: {_listed(found)} must agree.")
        return next(iter(found.values()), default)

    def attention_kinds(self) -> tuple[str, ...]:
        pattern = _per_layer(self.values.get("hybrid_layer_pattern"), {0: "full", 1: "sliding"}, self.where)
        types = _per_layer(
            self.values.get("layer_types"), {"full_attention": "full", "sliding_attention": "sliding"}, self.where
        )
        default = ("full",) * self.required("num_hidden_layers") if self.values["model_type"] == "mimo" else None
        return self._agreed_layers({"hybrid_layer_pattern": pattern, "layer_types": types}, default)

    def ffn_kinds(self) -> tuple[str, ...]:
        pattern = _per_layer(self.values.get("moe_layer_freq"), {0: "dense", 1: "moe"}, self.where)
        types = _per_layer(self.values.get("mlp_layer_types"), {"dense": "dense", "sparse": "moe"}, self.where)
        default = ("dense",) * self.required("num_hidden_layers") if self.values["model_type"] == "mimo" else None
        return self._agreed_layers({"moe_layer_freq": pattern, "mlp_layer_types": types}, default)

    def _agreed_layers(self, found: dict[str, tuple | None], default: tuple | None) -> tuple[str, ...]:
        stated = {key: kinds for key, kinds in found.items() if kinds is not None}
        if not stated:
            if default is None:
                raise ConfigError(f"{self.where} has neither {' nor '.join(found)}; one must say what each layer is.")
            return default
        if len(set(stated.values())) > 1:
            raise ConfigError(f"{self.where} contradicts itself: {' and '.join(stated)} name different layers.")
        kinds = next(iter(stated.values()))
        if len(kinds) != self.required("num_hidden_layers"):
            raise ConfigError(
                f"{self.where} has {len(kinds)} entries in {' and '.join(stated)}, but num_hidden_layers is "
                f"{self.values['num_hidden_layers']}."
            )
        return kinds

    def window_keys(self) -> int | None:
        values = self.values
        size, native = values.get("sliding_window_size"), values.get("sliding_window")
        if size is not None and native is not None and native not in (size, size + 1):
            raise ConfigError(
                f"{self.where} contradicts itself: sliding_window {native} and sliding_window_size {size} must be "
                "equal or differ by the query itself."
            )
        if values.get("window_keys") is not None:
            return values["window_keys"]
        return native if size is None else size + 1

    def attention(self, kind: str, window_keys: int | None) -> AttentionConfig:
        self.required("num_attention_heads")
        key_dim = self._geometry(kind, "head_dim", None)
        if key_dim is None:
            key_dim = self.required("hidden_size") // self.required("num_attention_heads")
        sliding_value_dim = key_dim if "swa_head_dim" in self.values else None
        value_dim = self._geometry(kind, "v_head_dim", sliding_value_dim if kind == "sliding" else None) or key_dim
        theta, factor = self._rope(kind)
        kv_heads = self._geometry(kind, "num_key_value_heads", None)
        if kv_heads is None:
            raise ConfigError(f"{self.where} lacks 'num_key_value_heads'.")
        for key, value in (("head_dim", key_dim), ("v_head_dim", value_dim), ("num_key_value_heads", kv_heads)):
            self._whole(key, value)
        # The native class has no key for it and gives sliding layers twice the key/value heads of full ones.
        if kind == "sliding" and "swa_num_key_value_heads" not in self.values:
            kv_heads = 2 * kv_heads
        sink_key = "add_swa_attention_sink_bias" if kind == "sliding" else "add_full_attention_sink_bias"
        native_default = kind == "sliding" and self.values["model_type"] == "mimo_v2_flash"
        return AttentionConfig(
            kind=kind,
            num_heads=self._geometry(kind, "num_attention_heads", None),
            num_kv_heads=kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            rotary_dim=int(key_dim * factor),
            rope_theta=float(theta),
            window_keys=window_keys,
            sink=bool(_or(self.values.get(sink_key), native_default)),
        )

    def _geometry(self, kind: str, key: str, sliding_default: Any) -> Any:
        """A value of one layer kind: `swa_<key>` for sliding layers, else the plain key."""
        if kind == "sliding":
            if self.values.get(f"swa_{key}") is not None:
                return self.values[f"swa_{key}"]
            if sliding_default is not None:
                return sliding_default
        return self.values.get(key)

    def _rope(self, kind: str) -> tuple[float, float]:
        """Base and rotated share of one layer kind, from the flat keys or from `rope_parameters`."""
        nested = self.values.get("rope_parameters") or {}
        nested = nested.get("sliding_attention" if kind == "sliding" else "full_attention", nested)
        if nested.get("rope_type", "default") != "default":
            raise ConfigError(f"{self.where} has rope_type {nested['rope_type']!r}; supported is 'default' only.")
        flat = self.values.get("swa_rope_theta" if kind == "sliding" else "rope_theta")
        theta = nested.get("rope_theta")
        if flat is not None and theta is not None and float(flat) != float(theta):
            raise ConfigError(f"{self.where} contradicts itself: RoPE base {flat} and {theta} for {kind} layers.")
        factor, flat_factor = nested.get("partial_rotary_factor"), self.values.get("partial_rotary_factor")
        if factor is not None and flat_factor is not None and factor != flat_factor:
            raise ConfigError(f"{self.where} contradicts itself: partial_rotary_factor {factor} and {flat_factor}.")
        theta = _or(flat, theta)
        if theta is None:
            raise ConfigError(f"{self.where} states no RoPE base for {kind} layers (rope_theta or rope_parameters).")
        return theta, _or(factor, _or(flat_factor, 1.0))

    def moe(self) -> MoEConfig:
        experts = self.agreed(("n_routed_experts", "num_local_experts"), None)
        if experts is None:
            raise ConfigError(f"{self.where} has sparse layers but no 'n_routed_experts'.")
        return MoEConfig(
            num_experts=experts,
            experts_per_token=self.required("num_experts_per_tok"),
            expert_dim=self.required("moe_intermediate_size"),
            num_groups=_or(self.values.get("n_group"), 1),
            groups_per_token=_or(self.values.get("topk_group"), 1),
            normalise_weights=_or(self.values.get("norm_topk_prob"), True),
            routed_scale=_or(self.values.get("routed_scaling_factor"), 1.0),
        )


def config_to_hf(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a model, in both dialects.

    A model that the native transformers class would silently compute wrongly (it derives sinks and sliding geometry
    from the layer kind) is written without an architecture that it knows, so that it refuses instead.
    """
    kinds = {layer.attention.kind: layer.attention for layer in config.layers}
    if config.mtp:
        kinds.setdefault(config.mtp.attention.kind, config.mtp.attention)
    _refuse_mixed_geometry(config, kinds)
    reference = kinds.get("full") or kinds["sliding"]
    values: dict[str, Any] = {
        "architectures": [
            ARCHITECTURES[config.family] if _native_class_agrees(config, kinds) else "OpenMiMoForCausalLM"
        ],
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
    if config.family == "mimo":
        values["rope_theta"] = reference.rope_theta
        values["partial_rotary_factor"] = _rotary_factor(reference)
        return values
    return values | _hybrid_keys(config, kinds, reference)


def _hybrid_keys(config: ModelConfig, kinds: dict[str, AttentionConfig], reference: AttentionConfig) -> dict[str, Any]:
    full, sliding = kinds.get("full", reference), kinds.get("sliding", reference)
    rope = {
        f"{name}_attention": {
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "partial_rotary_factor": _rotary_factor(spec),
        }
        for name, spec in (("full", full), ("sliding", sliding))
    }
    values: dict[str, Any] = {
        "layernorm_epsilon": config.norm_epsilon,
        "attention_value_scale": config.value_scale,
        "rope_parameters": rope,
        "rope_theta": full.rope_theta,
        "swa_rope_theta": sliding.rope_theta,
        "swa_num_attention_heads": sliding.num_heads,
        "swa_num_key_value_heads": sliding.num_kv_heads,
        "swa_head_dim": sliding.key_dim,
        "swa_v_head_dim": sliding.value_dim,
        "layer_types": [f"{layer.attention.kind}_attention" for layer in config.layers],
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
            "norm_topk_prob": config.moe.normalise_weights,
            "routed_scaling_factor": config.moe.routed_scale,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }
    return values


def _native_class_agrees(config: ModelConfig, kinds: dict[str, AttentionConfig]) -> bool:
    """Whether the native transformers class, which knows one geometry per model, computes this model."""
    if config.family != "mimo_v2_flash":
        return True
    full, sliding = kinds.get("full"), kinds.get("sliding")
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
    for number, layer in enumerate(config.layers):
        if layer.attention != kinds[layer.attention.kind]:
            raise ConfigError(
                f"layer {number} has a geometry of its own; config.json can state one for each kind of layer."
            )
    if config.mtp and config.mtp.attention != kinds["full" if _mtp_is_full(config.family, kinds) else "sliding"]:
        raise ConfigError("the MTP heads have a geometry of their own; config.json gives them that of a kind of layer.")


def _mtp_is_full(family: str, kinds: Iterable[str]) -> bool:
    """MTP heads are sliding layers wherever the model has any."""
    return family == "mimo" or "sliding" not in kinds


def _rotary_factor(spec: AttentionConfig) -> float:
    """A share of the key dims which truncates back to `rotary_dim`; the published 0.334 where it does."""
    if spec.rotary_dim == spec.key_dim:
        return 1.0
    return 0.334 if int(spec.key_dim * 0.334) == spec.rotary_dim else (spec.rotary_dim + 0.5) / spec.key_dim


def _per_layer(values: Any, names: dict[Any, str], where: str) -> tuple[str, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list):
        raise ConfigError(f"{where} describes its layers by {values!r}; it must be a list with one entry a layer.")
    for value in values:
        if value not in names:
            raise ConfigError(f"{where} calls a layer {value!r}; known are {', '.join(map(repr, names))}.")
    return tuple(names[value] for value in values)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _listed(found: dict[str, Any]) -> str:
    return " and ".join(f"{key} {value!r}" for key, value in found.items())
