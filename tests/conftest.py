"""Settings and models that many tests share."""

import functools
import gc
import os

# Set before torch is imported: threads that spin while they wait slow tests down by a large factor on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# `make sanitize` preloads the sanitizers into this process. A child that inherited one would count its shadow memory
# against the memory limits that some children run under.
os.environ.pop("LD_PRELOAD", None)
# Garbage collections take a quarter of the time of importing the tests, and find nothing: see pytest_collection_finish.
gc.disable()

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openmimo.model.config import ModelConfig
from openmimo.model.mimo import MiMo
from openmimo.model.presets import tiny
from openmimo.runtime import device

# The measurement takes as long as a short training run; here one per process is enough.
device.measured_matmul_flops = functools.cache(device.measured_matmul_flops)

with suppress(ImportError):  # without hypothesis, the tests that need it are skipped
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
    settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Excludes modules and collected tests, which live as long as the process, from later garbage collections."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _exact_float32():
    """Computes float32 products in full precision, also after a test that asked for less."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def without_figures(monkeypatch):
    """Reports of training runs without figures, which take longer to draw than the short runs of tests."""

    def write(folder: Path) -> Path:
        (folder / "report.html").write_text("<html>")
        return folder / "report.html"

    monkeypatch.setattr("openmimo.train.pretrain.write_report", write)


@torch.no_grad()
def randomize(model: MiMo, seed: int) -> MiMo:
    """Randomizes everything that initialization leaves constant (norms, sinks, biases), and draws wider weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.copy_(1 + 0.2 * noise)
        elif "sink" in name:
            tensor.copy_(noise)
        elif "correction_bias" in name or name.endswith(".bias"):
            tensor.copy_(0.3 * noise)
        else:
            tensor.copy_(0.15 * noise)
    return model.eval()


def tiny_config(*, window_keys: int = 9, num_layers: int = 5, mtp_heads: int = 0) -> ModelConfig:
    """A model of a few thousand parameters with both attention kinds and experts; MTP heads are optional.

    Layers 0, 3, 6, ... are full, so that five layers have each kind of neighbor.
    """
    base = tiny()
    full = replace(base.layers[0].attention, num_heads=8, num_kv_heads=2, key_dim=24, value_dim=16, rotary_dim=8)
    sliding = replace(full, kind="sliding", num_kv_heads=4, window_keys=window_keys, sink=True)
    full = replace(full, rope_theta=5e6)
    kinds = ["full" if index % 3 == 0 else "sliding" for index in range(num_layers)]
    layers = tuple(
        replace(base.layers[min(index, 1)], attention=full if kind == "full" else sliding)
        for index, kind in enumerate(kinds)
    )
    return replace(
        base,
        vocab_size=160,
        hidden_size=64,
        dense_ffn_dim=96,
        layers=layers,
        moe=replace(base.moe, expert_dim=32),
        mtp=replace(base.mtp, num_layers=mtp_heads, attention=sliding) if mtp_heads else None,
    )


def tiny_model(seed: int = 0, **config_changes) -> MiMo:
    """A random model of `tiny_config`."""
    return randomize(MiMo(tiny_config(**config_changes)), seed)
