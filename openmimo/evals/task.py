"""What an evaluation task is: a file in `openmimo/evals/tasks` that exports `PLUGIN`, a Task."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmimo.core.registry import Registry
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """A prompt, the answer expected to follow it, and where in the prompt the answer is found (0 start, 1 end)."""

    prompt_ids: list[int]
    answer_ids: list[int]
    depth: float


@dataclass(frozen=True)
class Task:
    """version: raised whenever scores stop being comparable. options: a frozen dataclass of settings.

    example(options, tokenizer, length, rng): one example of exactly `length` tokens, prompt and answer together, from
    nothing but its arguments. score(example, output_ids): 0 to 1.
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
    # to within rounding the interval holds the mean already; plots want it exactly
    return min(max(0.0, center - spread), mean), max(min(1.0, center + spread), mean)
