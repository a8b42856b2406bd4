"""The report's pre-training of MiMo-V2-Flash, number by number (paper section 3.1): 27 trillion tokens in three stages.

It states what the report states and is here to be read, derived from and checked; one process cannot hold this model.
The corpora are not public: put your own in the place of the text folders.
"""

from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.train.config import CheckpointConfig, EvaluationConfig, PretrainConfig, Stage

TRILLION = 10**12
LONG = 262_144
SHORT = 32_768


def text(folder: str, *, weight: float = 1.0) -> SourceConfig:
    """A folder of text files of your own."""
    return SourceConfig("text_folder", weight=weight, options={"path": folder})


def short_steps(tokens: float) -> int:
    """Optimiser steps that read `tokens` tokens in 2,048 rows of 32K."""
    return round(tokens / (2048 * SHORT))


def pretrain() -> PretrainConfig:
    """22T tokens at 32K, 4T with more code and 5 % synthetic reasoning, 1T at 256K with the larger RoPE base."""
    code = MixtureConfig((text("corpus/code_and_general", weight=0.95), text("corpus/synthetic", weight=0.05)))
    return PretrainConfig(
        run_folder="runs/flash_309b",
        model="flash",
        stages=(
            Stage(
                name="1", steps=short_steps(22 * TRILLION), sequence_length=SHORT, rows=2048, rows_at_start=128,
                rows_warmup_steps=short_steps(0.5 * TRILLION), warmup_steps=short_steps(0.05 * TRILLION),
                constant_steps=short_steps(12 * TRILLION), peak_lr=3.2e-4, end_lr=1e-4, mtp_weight=0.3, bias_rate=1e-3,
                full_rope_theta=640_000.0, mixture=MixtureConfig((text("corpus/general"),)),
            ),
            Stage(
                name="2", steps=short_steps(4 * TRILLION), sequence_length=SHORT, rows=2048, peak_lr=1e-4, end_lr=3e-5,
                mtp_weight=0.1, bias_rate=1e-3,
                mixture=code,
            ),
            Stage(
                name="3", steps=round(TRILLION / (256 * LONG)), sequence_length=LONG, rows=256,
                peak_lr=3e-5, end_lr=1e-5, mtp_weight=0.1, bias_rate=1e-5, full_rope_theta=5_000_000.0,
                mixture=code,
            ),
        ),
        rows_per_microbatch=1,
        activation_checkpointing=True,
        checkpoints=CheckpointConfig(every_steps=500, keep_last=2, keep_every=5000),
        evaluation=EvaluationConfig(every_steps=500, batches=8),
    )  # fmt: skip
