"""Add numbers: `27+35` gives `26`, the sum from its last digit to its first.

Small models learn reversed sums better (arXiv 2307.03381).
"""

import random
from dataclasses import dataclass
from typing import Annotated

from openmimo.core.fields import Bounds
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        reversed_answer: Whether the sum is written from its last digit to its first.
        terms: Number of terms.
    """

    reversed_answer: bool = True
    terms: Annotated[int, Bounds(least=2, most=100)] = 2


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with numbers of `difficulty` digits."""
    smallest = 10 ** (difficulty - 1) if difficulty > 1 else 0
    numbers = [rng.randrange(smallest, 10**difficulty) for _ in range(options.terms)]
    answer = str(sum(numbers))
    return Problem(
        family="addition",
        difficulty=difficulty,
        prompt="+".join(map(str, numbers)),
        answer=answer[::-1] if options.reversed_answer else answer,
    )


PLUGIN = TaskFamily(
    describe="add numbers of as many digits as the difficulty (options: reversed_answer, terms)",
    options=Options,
    difficulties=range(1, 21),
    make=make,
)
