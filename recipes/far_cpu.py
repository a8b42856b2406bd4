"""Extension of the laptop model to 64 times the length of its pre-training, in stages with a raised RoPE base.

    openmimo pretrain                  # rows of 64 to 256 tokens
    openmimo extend                    # to 1,024
    openmimo extend far_cpu:to_4096
    openmimo extend far_cpu:to_16384   # 64 times 256
    openmimo eval runs/far_16384/model --task needle --lengths 1024 4096 16384

Four times the length and four times the base in each stage, as in `tiny_cpu` and the report. The figures are in
docs/long_context.md.
"""

from dataclasses import replace

from openmimo.train.config import CheckpointConfig, EvaluationConfig, ExtendConfig
from recipes import tiny_cpu


def to_4096() -> ExtendConfig:
    """From the model of `tiny_cpu.extend`."""
    return _stage("runs/tiny_cpu_extended/model", 4096, batch=2, steps=60)


def to_16384() -> ExtendConfig:
    """From the model of `to_4096`."""
    return _stage("runs/far_4096/model", 16_384, batch=1, steps=120)


def _stage(checkpoint: str, length: int, *, batch: int, steps: int) -> ExtendConfig:
    mixture = tiny_cpu.mixture(
        replace(tiny_cpu.TEXT, weight=0.2), tiny_cpu.needles(weight=0.8, min_length=length // 8, num_pairs=4)
    )
    return replace(
        tiny_cpu.extend(),
        checkpoint=checkpoint,
        run_folder=f"runs/far_{length}",
        mixture=mixture,
        sequence_length=length,
        full_rope_theta=160_000.0 * length / 1024,
        steps=steps,
        global_batch_size=batch,
        micro_batch_size=1,
        checkpoints=CheckpointConfig(every_steps=20),
        evaluation=EvaluationConfig(every_steps=20, batches=2),
    )
