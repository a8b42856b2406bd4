"""Model configs by name, without torch.

`tiny` is for a CPU, `deep`, `small` and `medium` are for one GPU; `flash` (309B-A15B) and `mimo_7b` are the published
models.
`hysparse_7b` and `hysparse_80b` have the published geometry of HySparse; its paper publishes no weights.
`tiny_fairy`, `fairy_700m` and `fairy_1b3` have complex-valued layers. The presets `bytes_*` have layers of equal bytes
in different weight formats (recipe `low_bits`).
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

from openmimo.core.errors import ConfigError
from openmimo.core.files import file_in_folder, read_json
from openmimo.model.attention import AttentionConfig
from openmimo.model.config import ComplexConfig, LayerConfig, ModelConfig, MoEConfig, MTPConfig
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


def medium() -> ModelConfig:
    """Return a model of 1.28 billion parameters (0.27 billion active) for one GPU, whose dims are multiples of 128."""
    full = AttentionConfig(
        "full", num_heads=16, num_kv_heads=2, key_dim=192, value_dim=128, rotary_dim=64, rope_theta=640_000.0
    )
    sliding = replace(full, kind="sliding", window_keys=128, sink=True, rope_theta=10_000.0)
    return ModelConfig(
        vocab_size=32000,
        hidden_size=1024,
        dense_ffn_dim=4096,
        layers=hybrid_layers(12, full=full, sliding=sliding, moe=True),
        moe=MoEConfig(num_experts=64, experts_per_token=8, expert_dim=512),
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


def hysparse_layers(
    num_layers: int,
    *,
    full_layers: Collection[int],
    full: AttentionConfig,
    block: int,
    selected_keys: int,
    window_keys: int,
    gate: Literal["head", "channel"] = "head",
    sink: bool = True,
    moe: bool = False,
) -> tuple[LayerConfig, ...]:
    """Return the layers of HySparse (arXiv 2602.03560): each sparse layer reads the last full layer before it.

    Args:
        num_layers: Number of layers.
        full_layers: Indices of the full layers; 0 is one of them. In the paper, the last layer is another one.
        full: Geometry of the full layers. Its `sink` is theirs.
        block: Keys of a block; 1 selects tokens.
        selected_keys: Keys in the blocks that a query of a sparse layer reads.
        window_keys: Keys of the window of a sparse layer.
        gate: Granularity of the gates of a sparse layer.
        sink: Whether the two branches of a sparse layer have sinks.
        moe: Whether the layers have experts, besides layer 0.

    Raises:
        ConfigError: Layer 0 is not full.
    """
    if 0 not in full_layers:
        raise ConfigError(f"full_layers is {sorted(full_layers)}; layer 0 must be full, because others read its keys.")
    layers: list[LayerConfig] = []
    source = 0
    for index in range(num_layers):
        if index in full_layers:
            source = index
            is_read = index + 1 < num_layers and index + 1 not in full_layers
            attention = replace(full, score_block=block if is_read else None)
        else:
            attention = replace(
                full,
                kind="sparse",
                window_keys=window_keys,
                sink=sink,
                kv_from=source,
                score_block=block,
                selected_keys=selected_keys,
                gate=gate,
            )
        layers.append(LayerConfig(attention, "moe" if moe and index > 0 else "dense"))
    return tuple(layers)


def tiny_hysparse() -> ModelConfig:
    """Return `tiny` with sparse layers instead of sliding ones: full layers 0 and 5, blocks of 16 keys, 4 per query."""
    config = tiny()
    assert config.mtp is not None
    full = replace(config.layers[0].attention, num_kv_heads=2)
    layers = hysparse_layers(
        6, full_layers=(0, 5), full=full, block=16, selected_keys=64, window_keys=16, moe=config.moe is not None
    )
    head = replace(full, kind="sliding", window_keys=16, sink=True)
    return replace(config, layers=layers, mtp=replace(config.mtp, attention=head))


def hysparse_7b() -> ModelConfig:
    """Return the dense HySparse model of 36 layers, ten of them full (arXiv 2602.03560).

    The paper states layers, widths, heads, window, block and selected keys. It states neither the FFN nor the
    vocabulary, which are those of MiMo-7B here, nor whether a tenth full layer closes the network, as its text implies.
    """
    full = AttentionConfig(
        "full", num_heads=32, num_kv_heads=8, key_dim=128, value_dim=128, rotary_dim=128, rope_theta=640_000.0
    )
    return ModelConfig(
        vocab_size=151680,
        hidden_size=4096,
        dense_ffn_dim=11008,
        layers=hysparse_layers(
            36, full_layers=(*range(0, 36, 4), 35), full=full, block=64, selected_keys=1024, window_keys=128
        ),
        max_positions=32768,
    )


def hysparse_80b() -> ModelConfig:
    """Return the sparse-expert HySparse model of 49 layers, five of them full (arXiv 2602.03560).

    Experts have 512 hidden dims, which the paper does not state and which gives 80 billion parameters with 512 experts.
    """
    full = AttentionConfig(
        "full", num_heads=64, num_kv_heads=4, key_dim=128, value_dim=128, rotary_dim=128, rope_theta=640_000.0
    )
    return ModelConfig(
        vocab_size=151680,
        hidden_size=2048,
        dense_ffn_dim=8192,
        layers=hysparse_layers(
            49, full_layers=range(0, 49, 12), full=full, block=64, selected_keys=1024, window_keys=128, moe=True
        ),
        moe=MoEConfig(num_experts=512, experts_per_token=8, expert_dim=512),
        max_positions=32768,
    )


def tiny_fairy() -> ModelConfig:
    """Return `tiny` with complex-valued layers: as many real numbers a state, half of the parameters in its layers."""
    config = tiny()
    assert config.mtp is not None
    layers = tuple(
        replace(layer, attention=replace(layer.attention, rotary_dim=layer.attention.key_dim))
        for layer in config.layers
    )
    mtp = replace(config.mtp, attention=layers[1].attention)
    return replace(config, layers=layers, mtp=mtp, complex_layers=ComplexConfig())


def fairy_700m() -> ModelConfig:
    """Return Fairy+-i 700M (arXiv 2508.05571): 679 million complex weights in 24 full layers."""
    return _fairy(width=1536, ffn=4096, heads=16)


def fairy_1b3() -> ModelConfig:
    """Return Fairy+-i in the geometry of BitNet b1.58 1.3B (arXiv 2402.17764): 1.2 billion complex weights."""
    return _fairy(width=2048, ffn=5460, heads=32)


def _fairy(*, width: int, ffn: int, heads: int) -> ModelConfig:
    """Return a dense model of 24 full layers; the widths count complex numbers."""
    dims = 2 * width // heads
    full = AttentionConfig(
        "full", num_heads=heads, num_kv_heads=heads, key_dim=dims, value_dim=dims, rotary_dim=dims, rope_theta=1e4
    )
    return ModelConfig(
        vocab_size=32000,
        hidden_size=2 * width,
        dense_ffn_dim=2 * ffn,
        layers=(LayerConfig(full, "dense"),) * 24,
        init_std=0.02 / 2**0.5,
        max_positions=2048,
        complex_layers=ComplexConfig(),
    )


def bytes_fairy() -> ModelConfig:
    """Return 0.21 million complex weights, of 2 bits each in the format fairy: 53 kB."""
    return replace(_dense(width=128, head_dim=32, ffn=384), complex_layers=ComplexConfig())


def bytes_fairy_plain() -> ModelConfig:
    """Return `bytes_fairy` with the gate and norms of a real layer: silu, and no norm inside attention and FFN."""
    return replace(bytes_fairy(), complex_layers=ComplexConfig(gate="swiglu", sub_norms=False))


def bytes_ternary() -> ModelConfig:
    """Return 0.21 million real weights, of 2 bits each in the format ternary: 53 kB."""
    return _dense(width=64, head_dim=16, ffn=192)


def bytes_binary() -> ModelConfig:
    """Return 0.43 million real weights, of 1 bit each in the format binary: 53 kB."""
    return _dense(width=92, head_dim=22, ffn=268)


def bytes_real() -> ModelConfig:
    """Return 0.026 million real weights, of 16 bits each in bfloat16: 53 kB."""
    return _dense(width=24, head_dim=6, ffn=60)


def _dense(*, width: int, head_dim: int, ffn: int) -> ModelConfig:
    """Return a model of four full layers of four heads for the vocabulary of the built-in tokenizer."""
    full = AttentionConfig(
        "full", num_heads=4, num_kv_heads=4, key_dim=head_dim, value_dim=head_dim, rotary_dim=head_dim,
        rope_theta=1e4,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=512,
        hidden_size=width,
        dense_ffn_dim=ffn,
        layers=(LayerConfig(full, "dense"),) * 4,
        init_std=0.06,
        max_positions=512,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    preset.__name__: preset
    for preset in (
        tiny, tiny_all_global, tiny_no_sink, tiny_nope, tiny_alibi, tiny_hysparse, deep, small, medium, flash,
        flash_base, mimo_7b, hysparse_7b, hysparse_80b, tiny_fairy, fairy_700m, fairy_1b3, bytes_fairy,
        bytes_fairy_plain, bytes_ternary, bytes_binary, bytes_real,
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
