"""Drafting with `deep`, whose MTP heads are as small a part of the model as in the report. Eight minutes on one GPU.

Text and repeated passages are those of `drafts_cpu`, so `benchmarks/bench_speculation.py` measures both models.
"""

from dataclasses import replace

from openmimo.train.config import CheckpointConfig, EvaluationConfig, Phase, PretrainConfig
from recipes.tiny_cpu import REPEATS, TEXT, mixture


def pretrain() -> PretrainConfig:
    """Copying, then copying and text, then the same data with half of the gradient for the three heads."""
    data = mixture(replace(TEXT, weight=0.7, max_megabytes=0.0), REPEATS)
    return PretrainConfig(
        run_folder="runs/drafts_1gpu",
        model="deep",
        stages=(
            Phase(
                name="copy", steps=150, sequence_length=64, global_batch_size=256, warmup_steps=50, constant_steps=100,
                learning_rate=2e-3, end_learning_rate=2e-3, mixture=mixture(REPEATS), mtp_weight=0.3, bias_rate=1e-2,
            ),
            Phase(
                name="text", steps=300, sequence_length=256, global_batch_size=128, constant_steps=300,
                learning_rate=2e-3, end_learning_rate=2e-3, mixture=data, mtp_weight=0.3, bias_rate=1e-3,
            ),
            Phase(
                name="drafts", steps=150, sequence_length=256, global_batch_size=128, learning_rate=2e-3,
                end_learning_rate=5e-5, mixture=data, mtp_weight=1.0, bias_rate=1e-4,
            ),
        ),
        micro_batch_size=256,
        checkpoints=CheckpointConfig(every_steps=500),
        evaluation=EvaluationConfig(every_steps=300, batches=2),
        loader_workers=2,
    )  # fmt: skip
