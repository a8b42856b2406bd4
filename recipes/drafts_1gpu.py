"""What drafting gains where a head is as small a part of the model as in the report: `deep`, eight minutes on one GPU.

Its text and its repeated passages are those of `drafts_cpu`: `benchmarks/bench_speculation.py` measures both alike.
"""

from dataclasses import replace

from openmimo.train.config import CheckpointConfig, EvaluationConfig, Phase, PretrainConfig
from recipes.tiny_cpu import REPEATS, TEXT, mixture


def pretrain() -> PretrainConfig:
    """Copying first, then text with it; at the end the three heads get half of the gradient."""
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
