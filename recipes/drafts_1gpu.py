"""What drafting gains where a head is as small a part of the model as in the report: `deep`, ten minutes on one GPU.

The text and the repeated passages of `drafts_cpu`, so `benchmarks/bench_speculation.py` measures both alike.
"""

from dataclasses import replace

from openmimo.train.config import CheckpointConfig, EvaluationConfig, PretrainConfig, Stage
from recipes.tiny_cpu import REPEATS, TEXT, mixture


def pretrain() -> PretrainConfig:
    """Text and copying first; then the three heads get half of the gradient."""
    data = mixture(replace(TEXT, weight=0.7, max_megabytes=0.0), REPEATS)
    return PretrainConfig(
        run_folder="runs/drafts_1gpu",
        model="deep",
        stages=(
            Stage(
                name="model", steps=1400, sequence_length=256, rows=128, warmup_steps=100, constant_steps=1300,
                peak_lr=1.5e-3, end_lr=1.5e-3, mixture=data, mtp_weight=0.3, bias_rate=1e-3,
            ),
            Stage(
                name="drafts", steps=800, sequence_length=256, rows=128, peak_lr=1.5e-3, end_lr=5e-5, mixture=data,
                mtp_weight=1.0, bias_rate=1e-4,
            ),
        ),
        rows_per_microbatch=128,
        checkpoints=CheckpointConfig(every_steps=1000),
        evaluation=EvaluationConfig(every_steps=400, batches=2),
        loader_workers=4,
    )  # fmt: skip
