"""A hybrid MoE of 1.28 billion parameters on one GPU: the data of `small_1gpu`, at 4K tokens.

    openmimo pretrain medium_1gpu              # bfloat16
    openmimo pretrain medium_1gpu:pretrain_fp8 # the products of the layers in FP8, as in the report

Neither has been run to its end. Weights, gradients and optimizer state take 21 GB.
"""

from dataclasses import replace

from openmimo.data.config import MixtureConfig
from openmimo.train.config import CheckpointConfig, EvaluationConfig, Phase, PretrainConfig, TokenizerConfig
from recipes.small_1gpu import NEEDLES, PYTHON, WIKIPEDIA


def pretrain() -> PretrainConfig:
    """One stage of the report with a quarter of a billion tokens, 128K tokens per step."""
    return PretrainConfig(
        run_folder="runs/medium_1gpu",
        model="medium",
        stages=(
            Phase(
                name="1", steps=2000, sequence_length=4096, global_batch_size=32, initial_batch_size=8,
                batch_warmup_steps=200, warmup_steps=200, constant_steps=1000, learning_rate=6e-4,
                end_learning_rate=1e-4, mixture=MixtureConfig((WIKIPEDIA, PYTHON, NEEDLES)), mtp_weight=0.3,
                bias_rate=1e-3,
            ),
        ),
        micro_batch_size=4,
        checkpoints=CheckpointConfig(every_steps=500),
        evaluation=EvaluationConfig(every_steps=250, batches=4),
        tokenizer=TokenizerConfig(train_megabytes=40.0),
        tensorboard=True,
    )  # fmt: skip


def pretrain_fp8() -> PretrainConfig:
    """The same in FP8."""
    return replace(pretrain(), run_folder="runs/medium_1gpu_fp8", fp8=True)
