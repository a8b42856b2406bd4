"""Continues the demo's checkpoint with most of the loss weight on its three MTP heads, to improve their drafts.

Half of the rows repeat passages that fit in the window of a head, as in edited code and quoted text. There a head can
learn to predict several tokens ahead. `benchmarks/bench_speculation.py` measures the result.
"""

from openmimo.train.config import CheckpointConfig, EvaluationConfig, Phase, PretrainConfig
from recipes.tiny_cpu import REPEATS, TEXT, mixture


def pretrain() -> PretrainConfig:
    """About ten minutes on a CPU, from `runs/demo/extend/model`."""
    return PretrainConfig(
        run_folder="runs/drafts_cpu",
        init_from="runs/demo/extend/model",
        stages=(
            Phase(
                name="drafts", steps=1200, sequence_length=256, global_batch_size=8, warmup_steps=20,
                constant_steps=500, learning_rate=2e-3, end_learning_rate=1e-4, mixture=mixture(TEXT, REPEATS),
                mtp_weight=1.0, bias_rate=1e-4,
            ),
        ),
        micro_batch_size=8,
        threads=1,
        checkpoints=CheckpointConfig(every_steps=400),
        evaluation=EvaluationConfig(every_steps=400, batches=2),
    )  # fmt: skip
