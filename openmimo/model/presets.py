"""Model configs by name, without torch.

`tiny` is for a CPU, `deep` and `small` are for one GPU; `flash` (309B-A15B) and `mimo_7b` are the published models.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from openmimo.core.errors import ConfigError
from openmimo.core.files import file_in_folder, read_json
from openmimo.model.attention import AttentionConfig
from openmimo.model.config import LayerConfig, ModelConfig, MoEConfig, MTPConfig
from openmimo.model.hf_config import config_from_hf


def hybrid_layers(
    num_layers: int, *, full: AttentionConfig, sliding: AttentionConfig, moe: bool
) -> tuple[LayerConfig, ...]:
    """Return the pattern of the paper (section 2.1): layers 0, 5, 11, ... are full, and layer 0 has a dense FFN."""
    return tuple(
        LayerConfig(
            attention=full if index == 0 or (index + 1) % 6 == 0 else sliding,
            ffn="moe" if moe and index > 0 else "dense",
        )
        for index in range(num_layers)
    )


def tiny() -> ModelConfig:
    """Return a model of 1.6 million parameters: six layers (two full), eight experts (two active), one MTP head."""
    full = AttentionConfig("full", num_heads=4, num_kv_heads=1, key_dim=48, value_dim=32, rotary_dim=16, rope_theta=1e4)
    sliding = replace(full, kind="sliding", num_kv_heads=2, window_keys=32, sink=True)
    return ModelConfig(
        vocab_size=512,
        hidden_size=128,
        dense_ffn_dim=256,
        layers=hybrid_layers(6, full=full, sliding=sliding, moe=True),
        moe=MoEConfig(num_experts=8, experts_per_token=2, expert_dim=64),
        mtp=MTPConfig(num_layers=1, attention=sliding),
        value_scale=0.707,
        init_std=0.06,  # 0.006, the paper's value for 4096 dims, delays learning at 128 dims (docs/log.md)
        max_positions=512,
    )


def tiny_all_global() -> ModelConfig:
    """Return `tiny` with full attention in every layer, the first arm of the paper's ablation."""
    config = tiny()
    assert config.mtp is not None
    full = config.layers[0].attention
    return replace(
        config,
        layers=tuple(replace(layer, attention=full) for layer in config.layers),
        mtp=replace(config.mtp, attention=full),
    )


def tiny_no_sink() -> ModelConfig:
    """Return `tiny` without sinks, the second arm of the paper's ablation."""
    config = tiny()
    assert config.mtp is not None
    layers = tuple(replace(layer, attention=replace(layer.attention, sink=False)) for layer in config.layers)
    return replace(config, layers=layers, mtp=replace(config.mtp, attention=replace(config.mtp.attention, sink=False)))


def tiny_nope() -> ModelConfig:
    """Return `tiny` without positions in its full layers (NoPE); sliding layers keep RoPE."""
    return _with_full_layers(tiny(), rotary_dim=0)


def tiny_alibi() -> ModelConfig:
    """Return `tiny` with linear biases (ALiBi) in its full layers; sliding layers keep RoPE."""
    return _with_full_layers(tiny(), rotary_dim=0, kind="alibi")


def _with_full_layers(config: ModelConfig, *, rotary_dim: int, kind: str = "full") -> ModelConfig:
    layers = tuple(
        replace(layer, attention=replace(layer.attention, kind=kind, rotary_dim=rotary_dim))
        if layer.attention.kind == "full"
        else layer
        for layer in config.layers
    )
    return replace(config, layers=layers)


def deep() -> ModelConfig:
    """Return a model of 13 million parameters: 48 layers of `tiny` and three MTP heads, in proportion as in `flash`."""
    config = tiny()
    full, sliding = config.layers[0].attention, config.layers[1].attention
    layers = hybrid_layers(48, full=full, sliding=sliding, moe=True)
    return replace(config, layers=layers).with_mtp_heads(3)


def small() -> ModelConfig:
    """Return a model of 170 million parameters (40 million active) for one GPU."""
    full = AttentionConfig(
        "full", num_heads=8, num_kv_heads=2, key_dim=96, value_dim=64, rotary_dim=32, rope_theta=640_000.0
    )
    sliding = replace(full, kind="sliding", num_kv_heads=4, window_keys=128, sink=True, rope_theta=10_000.0)
    return ModelConfig(
        vocab_size=16384,
        hidden_size=512,
        dense_ffn_dim=2048,
        layers=hybrid_layers(12, full=full, sliding=sliding, moe=True),
        moe=MoEConfig(num_experts=32, experts_per_token=4, expert_dim=256),
        mtp=MTPConfig(num_layers=1, attention=sliding),
        value_scale=0.707,
        init_std=0.006,
        max_positions=32768,
    )


def flash() -> ModelConfig:
    """Return MiMo-V2-Flash, 309B-A15B, with its three published MTP heads (paper table 1)."""
    full = AttentionConfig(
        "full", num_heads=64, num_kv_heads=4, key_dim=192, value_dim=128, rotary_dim=64, rope_theta=5_000_000.0
    )
    sliding = replace(full, kind="sliding", num_kv_heads=8, window_keys=129, sink=True, rope_theta=10_000.0)
    return ModelConfig(
        vocab_size=152576,
        hidden_size=4096,
        dense_ffn_dim=16384,
        layers=hybrid_layers(48, full=full, sliding=sliding, moe=True),
        moe=MoEConfig(num_experts=256, experts_per_token=8, expert_dim=2048),
        mtp=MTPConfig(num_layers=3, attention=sliding),
        value_scale=0.707,
        init_std=0.006,
        max_positions=262144,
    )


def flash_base() -> ModelConfig:
    """Return `flash` during pre-training, with one MTP head and the RoPE base before extension (paper section 3.1)."""
    return flash().with_mtp_heads(1).with_full_rope(640_000.0)


def mimo_7b() -> ModelConfig:
    """Return MiMo-7B: 36 dense full layers with query/key/value biases, one full MTP layer (arXiv 2505.07608)."""
    full = AttentionConfig(
        "full", num_heads=32, num_kv_heads=8, key_dim=128, value_dim=128, rotary_dim=128, rope_theta=640_000.0
    )
    return ModelConfig(
        vocab_size=151680,
        hidden_size=4096,
        dense_ffn_dim=11008,
        layers=(LayerConfig(full, "dense"),) * 36,
        mtp=MTPConfig(num_layers=1, attention=full, hidden="post_norm"),
        attention_bias=True,
        max_positions=32768,
        family="mimo",
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    preset.__name__: preset
    for preset in (
        tiny, tiny_all_global, tiny_no_sink, tiny_nope, tiny_alibi, deep, small, flash, flash_base, mimo_7b,
    )
}  # fmt: skip


def model_config(name_or_path: str) -> ModelConfig:
    """Return the config of a preset by name, or of a Hugging Face `config.json` by its path or its folder's path.

    Raises:
        ConfigError: There is no such preset or file, or the file is not valid.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]()
    path = Path(name_or_path)
    if path.is_dir():
        path = file_in_folder(path, "config.json", ConfigError) or path / "config.json"
    if path.suffix != ".json":
        missing = "" if path.exists() else " (there is no such file)"
        known = ", ".join(PRESETS)
        raise ConfigError(f"model {name_or_path!r}{missing} is neither a preset ({known}) nor a config.json.")
    return config_from_hf(read_json(path), where=str(path))
