"""The report's attention ablation at a laptop's size (paper table 2): all layers global, hybrid without sinks, hybrid
with sinks. `openmimo pretrain ablation:all_global`, `ablation:no_sink`, `ablation:sink`; docs/log.md has the result.
"""

from dataclasses import replace

from openmimo.train.config import EvaluationConfig, Phase, PretrainConfig
from recipes import tiny_cpu


def sink() -> PretrainConfig:
    """Hybrid with sinks: `tiny` as it is."""
    return _arm("sink", "tiny")


def no_sink() -> PretrainConfig:
    """Hybrid without sinks."""
    return _arm("no_sink", "tiny_no_sink")


def all_global() -> PretrainConfig:
    """Every layer full."""
    return _arm("all_global", "tiny_all_global")


def _arm(name: str, model: str) -> PretrainConfig:
    """One million tokens of text in rows of 256, eight windows long."""
    text = Phase(
        name="text", steps=500, sequence_length=256, global_batch_size=8, warmup_steps=30, learning_rate=3e-3,
        end_learning_rate=3e-4, mixture=tiny_cpu.mixture(tiny_cpu.TEXT), bias_rate=1e-2,
    )  # fmt: skip
    return replace(
        tiny_cpu.pretrain(),
        run_folder=f"runs/ablation_{name}",
        model=model,
        stages=(text,),
        micro_batch_size=8,
        evaluation=EvaluationConfig(every_steps=100, batches=16),
    )
