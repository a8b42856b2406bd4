"""Modular arithmetic: `(3*4+5)%7` gives `3`."""

import random
from dataclasses import dataclass
from typing import Annotated

from openmimo.core.fields import Bounds
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        max_modulus: Largest modulus; 0 allows all numbers of up to `difficulty` digits.
    """

    max_modulus: Annotated[int, Bounds(least=0, most=10**6)] = 9


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem `(a*b+c)%m` with a, b and c of `difficulty` digits."""
    smallest = 10 ** (difficulty - 1) if difficulty > 1 else 0
    a, b, c = (rng.randrange(smallest, 10**difficulty) for _ in range(3))
    modulus = rng.randint(2, max(2, options.max_modulus or 10**difficulty - 1))
    return Problem(
        family="modular",
        difficulty=difficulty,
        prompt=f"({a}*{b}+{c})%{modulus}",
        answer=str((a * b + c) % modulus),
    )


PLUGIN = TaskFamily(
    describe="a*b+c modulo m, of numbers of as many digits as the difficulty (options: max_modulus)",
    options=Options,
    difficulties=range(1, 11),
    make=make,
)
