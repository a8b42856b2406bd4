"""Where a step stands: which stage, with which learning rate and batch. Pure functions of the config, without torch."""

import math
from dataclasses import dataclass

from openmimo.train.config import Phase


@dataclass(frozen=True)
class SchedulePosition:
    """Optimizer step `step` of the run (from 0) is step `stage_step` of stage number `stage_index`."""

    stage_index: int
    stage: Phase
    stage_step: int


def total_steps(stages: tuple[Phase, ...]) -> int:
    """Optimizer steps of all stages."""
    return sum(stage.steps for stage in stages)


def place_of(step: int, stages: tuple[Phase, ...]) -> SchedulePosition:
    """The place of optimizer step `step`; past the end, the last step's stage."""
    for index, stage in enumerate(stages):
        if step < stage.steps or index == len(stages) - 1:
            return SchedulePosition(index, stage, step)
        step -= stage.steps
    raise AssertionError("a run has at least one stage")


def learning_rate(stage: Phase, stage_step: int) -> float:
    """The learning rate of a step of a stage."""
    return warmed_cosine(
        stage_step,
        steps=stage.steps,
        peak=stage.learning_rate,
        end=stage.end_learning_rate,
        warmup_steps=stage.warmup_steps,
        constant_steps=stage.constant_steps,
    )


def warmed_cosine(
    step: int, *, steps: int, peak: float, end: float, warmup_steps: int, constant_steps: int = 0
) -> float:
    """Linear warm-up to the peak, a constant stretch, a cosine to the end (paper section 3.1). step: 0 to steps - 1."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    held = warmup_steps + constant_steps
    if step < held or steps == held:
        return peak
    progress = (step - held) / (steps - held)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def rows_of_step(stage: Phase, stage_step: int) -> int:
    """Rows in an optimizer step: a linear batch-size warm-up, then constant."""
    if stage.initial_batch_size is None or stage_step >= stage.batch_warmup_steps:
        return stage.global_batch_size
    share = stage_step / stage.batch_warmup_steps
    return round(stage.initial_batch_size + share * (stage.global_batch_size - stage.initial_batch_size))
