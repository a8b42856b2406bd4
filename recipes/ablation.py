"""The report's attention ablation at a laptop's size (paper table 2): all layers global, hybrid without sinks, hybrid
with sinks. `openmimo pretrain ablation:all_global`, `ablation:no_sink`, `ablation:sink`; docs/log.md has the result.
"""

from dataclasses import replace

from openmimo.train.config import PretrainConfig
from recipes import tiny_cpu


def sink() -> PretrainConfig:
    """Hybrid with sinks: `tiny` as it is, through the first three stages of `tiny_cpu`."""
    return _arm("sink", "tiny")


def no_sink() -> PretrainConfig:
    """Hybrid without sinks."""
    return _arm("no_sink", "tiny_no_sink")


def all_global() -> PretrainConfig:
    """Every layer full."""
    return _arm("all_global", "tiny_all_global")


def _arm(name: str, model: str) -> PretrainConfig:
    base = tiny_cpu.pretrain()
    return replace(base, run_folder=f"runs/ablation_{name}", model=model, stages=base.stages[:3])
