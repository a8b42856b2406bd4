"""Heads that draft well: the demo's checkpoint goes on with most of the weight on its three MTP heads.

Half of the rows repeat passages that a head's window holds whole, as edited code and quoted text do; there a head can
learn to see several tokens ahead. `benchmarks/bench_speculation.py` measures what comes of it.
"""

from openmimo.train.config import CheckpointConfig, EvaluationConfig, PretrainConfig, Stage
from recipes.tiny_cpu import REPEATS, TEXT, mixture


def pretrain() -> PretrainConfig:
    """Some ten minutes on a CPU, from `runs/demo/extend/model`."""
    return PretrainConfig(
        run_folder="runs/drafts_cpu",
        init_from="runs/demo/extend/model",
        stages=(
            Stage(
                name="drafts", steps=1200, sequence_length=256, rows=8, warmup_steps=20, constant_steps=500,
                peak_lr=2e-3, end_lr=1e-4, mixture=mixture(TEXT, REPEATS), mtp_weight=1.0, bias_rate=1e-4,
            ),
        ),
        rows_per_microbatch=8,
        threads=1,
        checkpoints=CheckpointConfig(every_steps=400),
        evaluation=EvaluationConfig(every_steps=400, batches=2),
    )  # fmt: skip
