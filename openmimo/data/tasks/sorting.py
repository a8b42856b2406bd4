"""Sort digits: `sort 3142` gives `1234`."""

import random
from dataclasses import dataclass

from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        descending: Whether the largest digit comes first.
    """

    descending: bool = False


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with `difficulty` digits."""
    digits = rng.choices("0123456789", k=difficulty)
    return Problem(
        family="sorting",
        difficulty=difficulty,
        prompt="sort " + "".join(digits),
        answer="".join(sorted(digits, reverse=options.descending)),
    )


PLUGIN = TaskFamily(
    describe="sort as many digits as the difficulty (options: descending)",
    options=Options,
    difficulties=range(2, 33),
    make=make,
)
