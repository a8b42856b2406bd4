"""Methods of context extension at laptop size: each extends the model of `openmimo pretrain` from 256 to 1,024 tokens.

    openmimo pretrain                           # the model, runs/tiny_cpu
    openmimo extend positions:raised_base       # the report's method
    openmimo extend positions:interpolated
    openmimo extend positions:ntk
    openmimo extend positions:yarn
    openmimo extend positions:unchanged
    openmimo pretrain positions:nope            # without positions in full layers, from scratch
    openmimo pretrain positions:alibi           # with linear biases in full layers, from scratch
    openmimo eval runs/positions_yarn/model --suite tiny

The extension runs are as long as that of `tiny_cpu`; they differ in full layers only. Sliding layers keep their base.
"""

from dataclasses import replace

from openmimo.model.config import RopeScaling
from openmimo.train.config import ExtendConfig, PretrainConfig
from recipes import tiny_cpu

_FACTOR, _ORIGINAL, _THETA = 4.0, 256, 40_000.0


def raised_base() -> ExtendConfig:
    """Four times the RoPE base, as in `tiny_cpu` and the report."""
    return replace(tiny_cpu.extend(), run_folder="runs/positions_raised_base")


def unchanged() -> ExtendConfig:
    """No change of the positions, only longer rows."""
    return _extended("unchanged", RopeScaling())


def interpolated() -> ExtendConfig:
    """Position interpolation (2306.15595)."""
    return _extended("interpolated", RopeScaling("linear", _FACTOR))


def ntk() -> ExtendConfig:
    """NTK-aware scaling."""
    return _extended("ntk", RopeScaling("ntk", _FACTOR))


def yarn() -> ExtendConfig:
    """YaRN (2309.00071)."""
    return _extended("yarn", RopeScaling("yarn", _FACTOR, _ORIGINAL))


def nope() -> PretrainConfig:
    """Pre-training without positions in full layers."""
    return _pretrained("nope")


def alibi() -> PretrainConfig:
    """Pre-training with linear biases in full layers."""
    return _pretrained("alibi")


def _extended(name: str, scaling: RopeScaling) -> ExtendConfig:
    return replace(
        tiny_cpu.extend(), run_folder=f"runs/positions_{name}", full_rope_theta=_THETA, full_rope_scaling=scaling
    )


def _pretrained(name: str) -> PretrainConfig:
    config = tiny_cpu.pretrain()
    stages = tuple(replace(stage, full_rope_theta=None) for stage in config.stages)
    return replace(config, run_folder=f"runs/positions_{name}", model=f"tiny_{name}", stages=stages)
