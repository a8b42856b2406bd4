"""A 170-million-parameter hybrid MoE on one GPU in an evening: English Wikipedia text and Python, 4K then 32K."""

from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.train.config import (
    CheckpointConfig,
    EvaluationConfig,
    ExtendConfig,
    PretrainConfig,
    Stage,
    TokenizerConfig,
)

WIKIPEDIA = SourceConfig("enwik8", weight=0.6)
PYTHON = SourceConfig("python_stdlib", weight=0.2)
NEEDLES = SourceConfig("needles", weight=0.2, options={"min_length": 256, "num_pairs": 8})


def pretrain() -> PretrainConfig:
    """About half a billion tokens in the report's three stages, 64K tokens a step."""
    mixture = MixtureConfig((WIKIPEDIA, PYTHON, NEEDLES))
    return PretrainConfig(
        run_folder="runs/small_1gpu",
        model="small",
        stages=(
            Stage(
                name="1", steps=6000, sequence_length=4096, rows=16, rows_at_start=4, rows_warmup_steps=500,
                warmup_steps=300, constant_steps=3300, peak_lr=1e-3, end_lr=3e-4, mixture=mixture, mtp_weight=0.3,
                bias_rate=1e-3,
            ),
            Stage(
                name="2", steps=1500, sequence_length=4096, rows=16, peak_lr=3e-4, end_lr=1e-4, mixture=mixture,
                mtp_weight=0.1, bias_rate=1e-3,
            ),
            Stage(
                name="3", steps=400, sequence_length=32_768, rows=2, peak_lr=1e-4, end_lr=3e-5, mixture=mixture,
                mtp_weight=0.1, bias_rate=1e-5, full_rope_theta=5_000_000.0,
            ),
        ),
        rows_per_microbatch=4,
        checkpoints=CheckpointConfig(every_steps=500),
        evaluation=EvaluationConfig(every_steps=500, batches=4),
        tokenizer=TokenizerConfig(train_megabytes=40.0),
        tensorboard=True,
    )  # fmt: skip


def extend() -> ExtendConfig:
    """To 64K, with three MTP heads."""
    return ExtendConfig(
        checkpoint="runs/small_1gpu/model",
        run_folder="runs/small_1gpu_extended",
        mixture=MixtureConfig((WIKIPEDIA, PYTHON, NEEDLES)),
        sequence_length=65_536,
        full_rope_theta=10_000_000.0,
        steps=200,
        rows=1,
        peak_lr=1e-4,
        end_lr=1e-5,
        mtp_heads=3,
        activation_checkpointing=True,
    )
