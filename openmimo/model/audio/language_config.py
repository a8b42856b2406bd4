"""Configs of audio language models (MiMo-Audio, arXiv 2512.23808), without torch: fields, presets, `config.json`.

The published `config.json` has the keys of Qwen2 for the backbone, and keys of its own for the patch encoder and the
patch decoder. Both directions are here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.fields import Bounds, check_fields
from openmimo.core.files import file_in_folder, read_json, read_known_keys
from openmimo.model.attention import AttentionConfig, RopeTheta, Size, is_global
from openmimo.model.config import LayerConfig, ModelConfig, MoEConfig
from openmimo.model.hf_config import config_from_hf
from openmimo.model.presets import hybrid_layers, mimo_7b

ARCHITECTURE = "MiMoAudioModel"
_OWN_TYPE = "openmimo_audio"
Delay = Annotated[int, Bounds(least=0, most=1024)]
CodeId = Annotated[int, Bounds(least=0, most=1 << 20)]


@dataclass(frozen=True)
class LocalConfig:
    """A small transformer that works inside one patch: full layers, biases of queries, keys and values, dense FFNs.

    Attributes:
        dim: Model dim.
        num_layers: Number of layers.
        num_heads: Heads of queries, keys and values.
        ffn_dim: Hidden dim of the FFN.
    """

    dim: Size
    num_layers: Annotated[int, Bounds(least=1, most=1024)]
    num_heads: Size
    ffn_dim: Size

    def __post_init__(self) -> None:
        check_fields(self, "local transformer")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                f"a local transformer has dim {self.dim} and {self.num_heads} heads; the dim of a head must be even."
            )


@dataclass(frozen=True)
class AudioModelConfig:
    """A whole audio language model.

    Attributes:
        backbone: The text model. It has no MTP heads.
        vocab_sizes: Number of ids of each codebook, the id of "no code" included.
        empty_ids: The id of "no code" of each codebook.
        delays: Steps by which each codebook is delayed in the patch decoder.
        patch_frames: Frames of one patch, which is one position of the backbone.
        encoder: The patch encoder.
        decoder: The patch decoder.
        bidirectional_encoder: Whether the frames of a patch see later ones in the patch encoder.
        local_rope_theta: RoPE base of both local transformers.
    """

    backbone: ModelConfig
    vocab_sizes: tuple[Size, ...]
    empty_ids: tuple[CodeId, ...]
    delays: tuple[Delay, ...]
    encoder: LocalConfig
    decoder: LocalConfig
    patch_frames: Annotated[int, Bounds(least=1, most=1024)] = 4
    bidirectional_encoder: bool = True
    local_rope_theta: RopeTheta = 640_000.0

    def __post_init__(self) -> None:
        check_fields(self, "audio model")
        counts = {len(self.vocab_sizes), len(self.empty_ids), len(self.delays)}
        if len(counts) > 1 or not self.vocab_sizes:
            raise ConfigError(
                f"the audio model states {len(self.vocab_sizes)} vocabulary sizes, {len(self.empty_ids)} empty ids and "
                f"{len(self.delays)} delays; it needs one of each for every codebook."
            )
        for number, (size, empty) in enumerate(zip(self.vocab_sizes, self.empty_ids, strict=True)):
            if empty >= size:
                raise ConfigError(f"codebook {number} has {size} ids, so its empty id cannot be {empty}.")
        if self.backbone.mtp is not None:
            raise ConfigError("the backbone of an audio model has no MTP heads; set mtp to None.")
        if self.backbone.complex_layers is not None:
            raise ConfigError("the backbone of an audio model has real layers; set complex_layers to None.")

    @property
    def num_codebooks(self) -> int:
        """Codebooks of a frame."""
        return len(self.vocab_sizes)

    @property
    def local_steps(self) -> int:
        """Steps of the patch decoder for one patch: its frames and the largest delay."""
        return self.patch_frames + max(self.delays)

    def local_model(self, local: LocalConfig) -> ModelConfig:
        """Return a local transformer as the config of a backbone. Its vocabulary is of no use."""
        head_dim = local.dim // local.num_heads
        attention = AttentionConfig(
            "full",
            num_heads=local.num_heads,
            num_kv_heads=local.num_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            rotary_dim=head_dim,
            rope_theta=self.local_rope_theta,
        )
        return ModelConfig(
            vocab_size=1,
            hidden_size=local.dim,
            dense_ffn_dim=local.ffn_dim,
            layers=(LayerConfig(attention, "dense"),) * local.num_layers,
            norm_epsilon=self.backbone.norm_epsilon,
            attention_bias=True,
            init_std=self.backbone.init_std,
            max_positions=max(self.local_steps, 1),
            family="mimo",
        )


def with_audio(
    backbone: ModelConfig,
    *,
    codebook_sizes: tuple[int, ...],
    encoder: LocalConfig,
    decoder: LocalConfig,
    patch_frames: int = 4,
    parallel_heads: bool = False,
    local_rope_theta: float = 640_000.0,
) -> AudioModelConfig:
    """Return the published geometry for a backbone: one more id for "no code", codebook q delayed by q steps.

    Args:
        backbone: The text model; its MTP heads are left out.
        codebook_sizes: Codes of each codebook.
        encoder: The patch encoder.
        decoder: The patch decoder.
        patch_frames: Frames of a patch.
        parallel_heads: Whether no codebook is delayed.
        local_rope_theta: RoPE base of both local transformers.
    """
    return AudioModelConfig(
        backbone=replace(backbone, mtp=None),
        vocab_sizes=tuple(size + 1 for size in codebook_sizes),
        empty_ids=codebook_sizes,
        delays=tuple(0 if parallel_heads else number for number in range(len(codebook_sizes))),
        encoder=encoder,
        decoder=decoder,
        patch_frames=patch_frames,
        local_rope_theta=local_rope_theta,
    )


def tiny_audio() -> AudioModelConfig:
    """Return a model of 1.6 million parameters: the dense family, patches of four frames, codebooks of `tiny_codec`."""
    full = AttentionConfig("full", num_heads=4, num_kv_heads=2, key_dim=32, value_dim=32, rotary_dim=32, rope_theta=1e4)
    backbone = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        dense_ffn_dim=320,
        layers=(LayerConfig(full, "dense"),) * 4,
        norm_epsilon=1e-6,
        attention_bias=True,
        init_std=0.06,
        max_positions=1024,
        family="mimo",
    )
    return with_audio(backbone, codebook_sizes=(256, 256, *(128,) * 6), encoder=_tiny_local(1), decoder=_tiny_local(2),
                      local_rope_theta=1e4)  # fmt: skip


def tiny_audio_hybrid() -> AudioModelConfig:
    """Return `tiny_audio` with sliding layers, sinks and experts in its backbone, as in MiMo-V2-Flash."""
    full = AttentionConfig("full", num_heads=4, num_kv_heads=1, key_dim=48, value_dim=32, rotary_dim=16, rope_theta=1e4)
    sliding = replace(full, kind="sliding", num_kv_heads=2, window_keys=32, sink=True)
    backbone = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        dense_ffn_dim=256,
        layers=hybrid_layers(6, full=full, sliding=sliding, moe=True),
        moe=MoEConfig(num_experts=8, experts_per_token=2, expert_dim=64),
        value_scale=0.707,
        init_std=0.06,
        max_positions=1024,
    )
    return replace(tiny_audio(), backbone=backbone)


def with_codebooks(config: AudioModelConfig, codebook_sizes: tuple[int, ...]) -> AudioModelConfig:
    """Return the model with the codebooks of an audio tokenizer; as many as it has, and no more than the tokenizer."""
    sizes = tuple(codebook_sizes[: config.num_codebooks])
    return replace(
        config, vocab_sizes=tuple(size + 1 for size in sizes), empty_ids=sizes, delays=config.delays[: len(sizes)]
    )


def _tiny_local(num_layers: int) -> LocalConfig:
    return LocalConfig(dim=96, num_layers=num_layers, num_heads=6, ffn_dim=384)


def mimo_audio_7b() -> AudioModelConfig:
    """Return MiMo-Audio-7B: MiMo-7B with six layers of patch encoder and 16 of patch decoder, 64 heads each."""
    backbone = replace(mimo_7b(), norm_epsilon=1e-6, max_positions=8192)
    return with_audio(
        backbone,
        codebook_sizes=(1024, 1024, *(128,) * 6),
        encoder=LocalConfig(dim=1024, num_layers=6, num_heads=64, ffn_dim=4096),
        decoder=LocalConfig(dim=1024, num_layers=16, num_heads=64, ffn_dim=4096),
    )


AUDIO_PRESETS: dict[str, Callable[[], AudioModelConfig]] = {
    preset.__name__: preset for preset in (tiny_audio, tiny_audio_hybrid, mimo_audio_7b)
}


def audio_model_config(name_or_path: str) -> AudioModelConfig:
    """Return the config of a preset by name, or of a `config.json` by its path or its folder's path.

    Raises:
        ConfigError: There is no such preset or file, or the file is not valid.
    """
    if name_or_path in AUDIO_PRESETS:
        return AUDIO_PRESETS[name_or_path]()
    path = Path(name_or_path)
    if path.is_dir():
        path = file_in_folder(path, "config.json", ConfigError) or path / "config.json"
    if path.suffix != ".json":
        known = ", ".join(AUDIO_PRESETS)
        raise ConfigError(f"audio model {name_or_path!r} is neither a preset ({known}) nor a config.json.")
    return audio_config_from_hf(read_json(path), where=str(path))


@dataclass(frozen=True)
class _AudioKeys:
    """The keys of `config.json` that describe patches. Lists of numbers are strings, such as "0-1-2"."""

    group_size: Annotated[int, Bounds(least=1, most=1024)]
    audio_channels: Annotated[int, Bounds(least=1, most=1024)]
    delay_pattern: str | int
    speech_vocab_size: str | int
    speech_zeroemb_idx: str | int
    local_dim: Size
    local_layers: Size
    local_attn_heads: Size
    local_ffn_dim: Size
    input_local_layers: Size
    input_local_dim: Size | None = None
    input_full_attention: bool | None = None
    add_input_local_transformer: Literal[True] | None = None
    local_rope_theta: RopeTheta | None = None
    backbone_type: Literal["mimo", "mimo_v2_flash"] | None = None


_INERT = {
    "n_rvq", "add_speech_sosp_eosp", "local_attn_dropout", "empty_loss_weight", "tokenizer_version",
}  # fmt: skip
_QWEN2_INERT = {"sliding_window", "use_mrope", "layer_types"}
_PUBLIC_HEAD_DIM = 128  # of the public config class


def is_audio_folder(path: str | Path) -> bool:
    """Return whether the `config.json` of a folder describes an audio language model. False if it cannot be read."""
    try:
        values = read_json(Path(path) / "config.json")
    except UserError:
        return False
    return isinstance(values, dict) and ARCHITECTURE in (values.get("architectures") or ())


def audio_config_from_hf(values: dict[str, Any], *, where: str = "config.json") -> AudioModelConfig:
    """Convert a published or saved `config.json`.

    Raises:
        ConfigError: The message names `where` and all keys with a wrong type or value.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a JSON object, not a {type(values).__name__}.")
    names = _AudioKeys.__dataclass_fields__
    if "group_size" not in values or "speech_vocab_size" not in values:
        raise ConfigError(
            f"{where} has no group_size and speech_vocab_size, so it describes no audio language model. Give a folder "
            "of MiMo-Audio, or one that `save_audio_model` has written."
        )
    keys = read_known_keys(_AudioKeys, {name: value for name, value in values.items() if name in names}, where)
    rest = {name: value for name, value in values.items() if name not in names and name not in _INERT}
    _check_nested(rest.pop("audio_config", None), keys, where)
    backbone = config_from_hf(_backbone_keys(rest, keys), where=where, num_mtp_heads=0)
    theta = next(layer.attention for layer in backbone.layers if is_global(layer.attention)).rope_theta
    try:
        encoder_dim = keys.input_local_dim or keys.local_dim
        return AudioModelConfig(
            backbone=backbone,
            vocab_sizes=_numbers(keys.speech_vocab_size, keys, f"{where}: speech_vocab_size"),
            empty_ids=_numbers(keys.speech_zeroemb_idx, keys, f"{where}: speech_zeroemb_idx"),
            delays=_numbers(keys.delay_pattern, keys, f"{where}: delay_pattern"),
            encoder=LocalConfig(encoder_dim, keys.input_local_layers, keys.local_attn_heads, 4 * encoder_dim),
            decoder=LocalConfig(keys.local_dim, keys.local_layers, keys.local_attn_heads, keys.local_ffn_dim),
            patch_frames=keys.group_size,
            bidirectional_encoder=bool(keys.input_full_attention),
            local_rope_theta=theta if keys.local_rope_theta is None else keys.local_rope_theta,
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _backbone_keys(rest: dict[str, Any], keys: _AudioKeys) -> dict[str, Any]:
    """Return the keys of the backbone as those of a text model."""
    if rest.get("model_type") == _OWN_TYPE:
        return {**rest, "model_type": keys.backbone_type or "mimo"}
    if rest.get("model_type") not in ("qwen2", "mimo_audio"):
        return rest
    rest = {name: value for name, value in rest.items() if name not in _QWEN2_INERT}
    stated = {"head_dim": _PUBLIC_HEAD_DIM, "attention_bias": True, **rest, "model_type": "mimo"}
    return {name: value for name, value in stated.items() if value is not None or name.endswith("token_id")}


def _check_nested(nested: Any, keys: _AudioKeys, where: str) -> None:
    """Refuse an `audio_config` that contradicts the other keys; later models of the family state both."""
    if nested is None:
        return
    if not isinstance(nested, dict):
        raise ConfigError(f"{where}: audio_config must be a JSON object.")
    expected: dict[str, Any] = {
        name: getattr(keys, name)
        for name in ("group_size", "audio_channels", "speech_vocab_size", "speech_zeroemb_idx", "input_local_layers")
    }
    expected |= {"input_local_attn_heads": keys.local_attn_heads, "projection_layers": 1, "partial_rotary_factor": 1.0}
    for name, value in expected.items():
        if name in nested and nested[name] != value:
            raise ConfigError(f"{where}: audio_config.{name} is {nested[name]!r}; this model needs {value!r}.")


def _numbers(value: str | int, keys: _AudioKeys, where: str) -> tuple[int, ...]:
    """Return the number of each codebook of a list such as "0-1-2", or of one number for all."""
    parts = str(value).split("-")
    if not all(part.isascii() and part.isdecimal() and len(part) < 8 for part in parts):
        raise ConfigError(f"{where} is {value!r}; it must be numbers with '-' between them.")
    numbers = [int(part) for part in parts]
    return tuple(numbers if len(numbers) > 1 else numbers * keys.audio_channels)


def audio_keys(config: AudioModelConfig) -> dict[str, Any]:
    """Return the entries of `config.json` that differ from those of the backbone alone. Raises ConfigError."""
    encoder, decoder = config.encoder, config.decoder
    if encoder.num_heads != decoder.num_heads or encoder.ffn_dim != 4 * encoder.dim:
        raise ConfigError(
            "config.json states one number of heads for both local transformers, and a patch encoder with an FFN of 4 "
            f"x {encoder.dim}; this model has {encoder.num_heads} and {decoder.num_heads} heads and {encoder.ffn_dim}."
        )
    first = next(layer.attention for layer in config.backbone.layers if is_global(layer.attention))
    is_published = config.backbone.family == "mimo" and config.backbone.attention_bias
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen2" if is_published else _OWN_TYPE,
        "group_size": config.patch_frames,
        "audio_channels": config.num_codebooks,
        "delay_pattern": _joined(config.delays),
        "speech_vocab_size": _joined(config.vocab_sizes),
        "speech_zeroemb_idx": _joined(config.empty_ids),
        "local_dim": decoder.dim,
        "local_layers": decoder.num_layers,
        "local_attn_heads": decoder.num_heads,
        "local_ffn_dim": decoder.ffn_dim,
        "input_local_layers": encoder.num_layers,
        "input_local_dim": encoder.dim,
        "input_full_attention": config.bidirectional_encoder,
    }
    if not is_published:
        values["backbone_type"] = config.backbone.family
    if config.local_rope_theta != first.rope_theta:
        values["local_rope_theta"] = config.local_rope_theta
    return values


def _joined(numbers: tuple[int, ...]) -> str:
    return "-".join(map(str, numbers))
