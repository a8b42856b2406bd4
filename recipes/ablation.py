"""The attention ablation of the report (table 2) at laptop size: all layers global, hybrid with and without sinks.

    openmimo pretrain ablation:all_global
    openmimo pretrain ablation:no_sink
    openmimo pretrain ablation:sink

docs/log.md contains the results.
"""

from dataclasses import replace

from openmimo.train.config import EvaluationConfig, Phase, PretrainConfig
from recipes import tiny_cpu


def sink() -> PretrainConfig:
    """Hybrid with sinks: the preset `tiny`."""
    return _arm("sink", "tiny")


def no_sink() -> PretrainConfig:
    """Hybrid without sinks."""
    return _arm("no_sink", "tiny_no_sink")


def all_global() -> PretrainConfig:
    """Full attention in every layer."""
    return _arm("all_global", "tiny_all_global")


def _arm(name: str, model: str) -> PretrainConfig:
    """One million tokens of text in rows of 256 tokens, which is eight windows."""
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
