"""Count a digit: `count 3 in 31323` gives `3`."""

import random
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        num_digits: Number of different digits, starting at 0. Fewer digits give larger counts.
    """

    num_digits: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.num_digits <= 10:
            raise ConfigError(f"num_digits of task 'count' is {self.num_digits}; it must be between 2 and 10.")


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with `difficulty` digits."""
    alphabet = "0123456789"[: options.num_digits]
    digits = "".join(rng.choices(alphabet, k=difficulty))
    counted = rng.choice(alphabet)
    return Problem(
        family="count",
        difficulty=difficulty,
        prompt=f"count {counted} in {digits}",
        answer=str(digits.count(counted)),
    )


PLUGIN = TaskFamily(
    describe="count a digit among as many as the difficulty (options: num_digits)",
    options=Options,
    difficulties=range(2, 33),
    make=make,
)
