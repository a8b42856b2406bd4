"""The report's three stages at a size that a laptop trains in minutes: 1.6 million parameters, real text, one MTP head."""

from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.train.config import CheckpointConfig, EvaluationConfig, ExtendConfig, PretrainConfig, Stage

TEXT = SourceConfig("python_stdlib", weight=0.5, max_megabytes=8.0)
REPEATS = SourceConfig("repeats", weight=0.25, options={"alphabet": "characters"})


def needles(*, weight: float, min_length: int) -> SourceConfig:
    """Retrieval examples of `min_length` tokens up to a whole row."""
    return SourceConfig("needles", weight=weight, options={"min_length": min_length})


def pretrain() -> PretrainConfig:
    """Three stages: general, more synthetic reasoning, and a longer context with a larger RoPE base."""
    general = MixtureConfig((TEXT, REPEATS, needles(weight=0.25, min_length=48)))
    reasoning = MixtureConfig((TEXT, needles(weight=0.5, min_length=48)))
    return PretrainConfig(
        run_folder="runs/tiny_cpu",
        model="tiny",
        stages=(
            Stage(
                name="general", steps=400, sequence_length=128, rows=64, rows_at_start=32, rows_warmup_steps=100,
                warmup_steps=40, constant_steps=240, peak_lr=3e-3, end_lr=1e-3, mixture=general, mtp_weight=0.3,
                bias_rate=1e-2,
            ),
            Stage(
                name="reasoning", steps=100, sequence_length=128, rows=64, peak_lr=1e-3, end_lr=5e-4, mixture=reasoning,
                mtp_weight=0.1, bias_rate=1e-2,
            ),
            Stage(
                name="long", steps=60, sequence_length=1024, rows=8, peak_lr=5e-4, end_lr=1e-4, mixture=reasoning,
                mtp_weight=0.1, bias_rate=1e-4, full_rope_theta=80_000.0,
            ),
        ),
        rows_per_microbatch=64,
        checkpoints=CheckpointConfig(every_steps=100),
        evaluation=EvaluationConfig(every_steps=100, batches=1),
    )  # fmt: skip


def extend() -> ExtendConfig:
    """Eight times the context for a checkpoint of `pretrain`, with eight times the RoPE base."""
    return ExtendConfig(
        checkpoint="runs/tiny_cpu/model",
        run_folder="runs/tiny_cpu_extended",
        mixture=MixtureConfig((TEXT, needles(weight=0.5, min_length=128))),
        sequence_length=2048,
        full_rope_theta=160_000.0,
        steps=60,
        rows=4,
        rows_per_microbatch=4,
        peak_lr=5e-4,
        end_lr=1e-4,
        bias_rate=1e-4,
        checkpoints=CheckpointConfig(every_steps=30),
        evaluation=EvaluationConfig(every_steps=30, batches=1),
    )
