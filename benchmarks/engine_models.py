"""The models of `bench_engine`: random weights under the published tensor names, saved once per folder."""

from dataclasses import replace
from pathlib import Path

import torch

from openmimo.model.attention import AttentionConfig
from openmimo.model.config import ModelConfig, MoEConfig, MTPConfig
from openmimo.model.hf import load_config, save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import hybrid_layers

WINDOW_KEYS = 128  # written as `sliding_window`, with which all peers use 128 keys including the query's own
_INIT_STD = 0.03  # large enough that greedy text does not repeat one token


def med() -> ModelConfig:
    """A model of 1.33 billion parameters, 0.28 billion of them active per token."""
    return _hybrid(
        num_layers=12, hidden_size=1024, num_heads=16, key_dim=192, value_dim=128, rotary_dim=64, dense_ffn_dim=4096,
        moe=MoEConfig(num_experts=64, experts_per_token=8, expert_dim=512), vocab_size=32768,
    )  # fmt: skip


def med_eq() -> ModelConfig:
    """`med` with values as wide as keys, which vLLM requires on a CPU."""
    config = med()
    layers = tuple(replace(layer, attention=replace(layer.attention, value_dim=192)) for layer in config.layers)
    mtp = replace(config.mtp, attention=replace(config.mtp.attention, value_dim=192))
    return replace(config, layers=layers, mtp=mtp)


def tiny() -> ModelConfig:
    """A model of 16 million parameters, for trial runs."""
    return _hybrid(
        num_layers=7, hidden_size=256, num_heads=8, key_dim=48, value_dim=32, rotary_dim=16, dense_ffn_dim=1024,
        moe=MoEConfig(num_experts=16, experts_per_token=4, expert_dim=128), vocab_size=4096,
    )  # fmt: skip


CONFIGS = {config.__name__: config for config in (med, med_eq, tiny)}


def checkpoint(name: str, folder: Path) -> ModelConfig:
    """Returns the config of the model `name` in a folder. Creates a missing model with random bfloat16 weights."""
    if not (folder / "config.json").exists():
        save_model(_random_model(CONFIGS[name]()), folder)
    return load_config(folder)


def _hybrid(*, num_heads: int, key_dim: int, value_dim: int, rotary_dim: int, num_layers: int, **sizes) -> ModelConfig:
    full = AttentionConfig(
        "full", num_heads=num_heads, num_kv_heads=2, key_dim=key_dim, value_dim=value_dim, rotary_dim=rotary_dim,
        rope_theta=5_000_000.0,
    )  # fmt: skip
    sliding = replace(
        full, kind="sliding", num_kv_heads=4, window_keys=WINDOW_KEYS, sink=True, rope_theta=10_000.0
    )  # fmt: skip
    return ModelConfig(
        layers=hybrid_layers(num_layers, full=full, sliding=sliding, moe=True),
        mtp=MTPConfig(num_layers=3, attention=sliding),
        value_scale=0.707,
        init_std=_INIT_STD,
        max_positions=32768,
        **sizes,
    )


@torch.no_grad()
def _random_model(config: ModelConfig) -> MiMo:
    """Returns a bfloat16 model with float32 routers. Norms, sinks and biases are random: initial values hide bugs."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = MiMo(config).to(torch.bfloat16)
    for router in model.routers().values():
        router.float()
    model = model.to_empty(device="cpu")
    model.initialize(generator)
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.normal_(mean=1.0, std=0.1, generator=generator)
        elif "sink" in name:
            tensor.normal_(std=1.0, generator=generator)
        elif "e_score_correction_bias" in name:
            tensor.normal_(std=0.05, generator=generator)
    return model.eval()
