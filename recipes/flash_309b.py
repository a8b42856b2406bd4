"""The pre-training of MiMo-V2-Flash with the numbers of the report (section 3.1): 27 trillion tokens in three stages.

This recipe is a reference and a base for other recipes. The corpora are not public; replace the text folders with your
own. The model does not fit in one process: `on_256_devices` and `long_on_256_devices` have meshes for devices of 80 GB,
by the prediction of `openmimo plan` and not by a run.
"""

import math
from dataclasses import replace

from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.train.config import CheckpointConfig, EvaluationConfig, ParallelConfig, Phase, PretrainConfig

TRILLION = 10**12
LONG = 262_144
SHORT = 32_768


def text(folder: str, *, weight: float = 1.0) -> SourceConfig:
    """A source that reads a folder of text files."""
    return SourceConfig("text_folder", weight=weight, options={"path": folder})


ROWS = 2048
ROWS_MULTIPLE = 128  # so that up to 128 ranks with different rows can share a step of the ramp
ROWS_AT_START = 128  # not in the report, which states only the length and the end of the ramp
# While the number of rows rises linearly, a step has the mean of the first and the last number on average.
RAMP_STEPS = round(0.5 * TRILLION / (SHORT * (ROWS_AT_START + ROWS) / 2))


def short_steps(tokens: float) -> int:
    """Number of optimizer steps that read `tokens` tokens in batches of 2,048 rows of 32K."""
    return round(tokens / (ROWS * SHORT))


def steps_from_start(tokens: float) -> int:
    """Number of optimizer steps that read the first `tokens` tokens of stage 1, including the batch ramp."""
    if tokens >= 0.5 * TRILLION:
        return RAMP_STEPS + short_steps(tokens - 0.5 * TRILLION)
    slope = (ROWS - ROWS_AT_START) / RAMP_STEPS
    return round((math.sqrt(ROWS_AT_START**2 + 2 * slope * tokens / SHORT) - ROWS_AT_START) / slope)


def pretrain() -> PretrainConfig:
    """22T tokens at 32K, 4T with more code and 5 % synthetic reasoning, 1T at 256K with a larger RoPE base."""
    warmup = steps_from_start(0.05 * TRILLION)
    code = MixtureConfig((text("corpus/code_and_general", weight=0.95), text("corpus/synthetic", weight=0.05)))
    return PretrainConfig(
        run_folder="runs/flash_309b",
        model="flash_base",
        stages=(
            Phase(
                name="1", steps=steps_from_start(22 * TRILLION), sequence_length=SHORT, global_batch_size=ROWS,
                initial_batch_size=ROWS_AT_START, batch_warmup_steps=RAMP_STEPS, batch_multiple=ROWS_MULTIPLE,
                warmup_steps=warmup,
                constant_steps=steps_from_start(12.05 * TRILLION) - warmup, learning_rate=3.2e-4,
                end_learning_rate=1e-4, mtp_weight=0.3, bias_rate=1e-3,
                mixture=MixtureConfig((text("corpus/general"),)),
            ),
            Phase(
                name="2", steps=short_steps(4 * TRILLION), sequence_length=SHORT, global_batch_size=ROWS,
                learning_rate=1e-4, end_learning_rate=3e-5, mtp_weight=0.1, bias_rate=1e-3,
                mixture=code,
            ),
            Phase(
                name="3", steps=round(TRILLION / (256 * LONG)), sequence_length=LONG, global_batch_size=256,
                learning_rate=3e-5, end_learning_rate=1e-5, mtp_weight=0.1, bias_rate=1e-5, full_rope_theta=5_000_000.0,
                mixture=code,
            ),
        ),
        micro_batch_size=1,
        activation_checkpointing=True,
        checkpoints=CheckpointConfig(every_steps=500, keep_last=2, keep_every=5000),
        evaluation=EvaluationConfig(every_steps=500, batches=8),
    )  # fmt: skip


def on_256_devices() -> PretrainConfig:
    """Eight pipeline stages of 32 devices, for rows of 32K: stages 1 and 2. 59 GB a device (planned)."""
    return replace(pretrain(), parallel=ParallelConfig(pp=8, dp_shard=32, ep=8))


def long_on_256_devices() -> PretrainConfig:
    """Two pipeline stages of 128 devices, 16 of which share a row of 256K: stage 3. 44 GB a device (planned).

    Stop the run of `on_256_devices` at the end of stage 2, and continue its folder with this function.
    """
    return replace(pretrain(), parallel=ParallelConfig(pp=2, dp_shard=8, cp=16, ep=8))
