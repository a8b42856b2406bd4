"""Where a step stands: which stage, with which learning rate and batch. Pure functions of the config, without torch."""

import math
from dataclasses import dataclass

from openmimo.train.config import Stage


@dataclass(frozen=True)
class Place:
    """Optimiser step `step` of the run (from 0) is step `stage_step` of stage number `stage_index`."""

    stage_index: int
    stage: Stage
    stage_step: int


def total_steps(stages: tuple[Stage, ...]) -> int:
    """Optimiser steps of all stages."""
    return sum(stage.steps for stage in stages)


def place_of(step: int, stages: tuple[Stage, ...]) -> Place:
    """The place of optimiser step `step`; past the end, the last step's stage."""
    for index, stage in enumerate(stages):
        if step < stage.steps or index == len(stages) - 1:
            return Place(index, stage, step)
        step -= stage.steps
    raise AssertionError("a run has at least one stage")


def learning_rate(stage: Stage, stage_step: int) -> float:
    """Linear warm-up to the peak, a constant stretch, a cosine to the end (paper section 3.1)."""
    if stage_step < stage.warmup_steps:
        return stage.peak_lr * (stage_step + 1) / stage.warmup_steps
    held = stage.warmup_steps + stage.constant_steps
    if stage_step < held or stage.steps == held:
        return stage.peak_lr
    progress = (stage_step - held) / (stage.steps - held)
    return stage.end_lr + (stage.peak_lr - stage.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def rows_of_step(stage: Stage, stage_step: int) -> int:
    """Rows in an optimiser step: a linear batch-size warm-up, then constant."""
    if stage.rows_at_start is None or stage_step >= stage.rows_warmup_steps:
        return stage.rows
    share = stage_step / stage.rows_warmup_steps
    return round(stage.rows_at_start + share * (stage.rows - stage.rows_at_start))
