"""The interface of evaluation tasks: a file in `openmimo/evals/tasks` exports `PLUGIN`, a Task."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmimo.core.registry import Registry
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """A prompt, the expected answer, and the relative position of the answer in the prompt (0 start, 1 end)."""

    prompt_ids: list[int]
    answer_ids: list[int]
    depth: float


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Attributes:
        version: Incremented when scores are no longer comparable.
        options: A frozen dataclass of settings.
        example: `example(options, tokenizer, length, rng)` returns an example of exactly `length` tokens (prompt and
            answer). It is a pure function of its arguments.
        score: `score(example, output_ids)` returns 0 to 1.
    """

    version: int
    options: type
    example: Callable[[Any, Tokenizer, int, np.random.Generator], Example]
    score: Callable[[Example, list[int]], float]


TASKS: Registry[Task] = Registry("openmimo.evals.tasks", Task)


@dataclass(frozen=True)
class Score:
    """The mean score at one length with its 95 % Wilson interval."""

    length: int
    examples: int
    mean: float
    low: float
    high: float


def wilson_interval(mean: float, examples: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share observed over `examples` trials."""
    z = 1.96
    center = (mean + z * z / (2 * examples)) / (1 + z * z / examples)
    spread = z / (1 + z * z / examples) * math.sqrt(mean * (1 - mean) / examples + z * z / (4 * examples**2))
    # rounding may put the mean slightly outside the interval; plots need it inside
    return min(max(0.0, center - spread), mean), max(min(1.0, center + spread), mean)
