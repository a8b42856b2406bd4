"""Remove repeated digits: `uniq 3313` gives `31`."""

import random
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        num_digits: Number of different digits, starting at 0.
    """

    num_digits: int = 10

    def __post_init__(self) -> None:
        if not 2 <= self.num_digits <= 10:
            raise ConfigError(f"num_digits of task 'unique' is {self.num_digits}; it must be between 2 and 10.")


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with `difficulty` digits. The answer has the different ones in order of first occurrence."""
    digits = rng.choices("0123456789"[: options.num_digits], k=difficulty)
    return Problem(
        family="unique",
        difficulty=difficulty,
        prompt="uniq " + "".join(digits),
        answer="".join(dict.fromkeys(digits)),
    )


PLUGIN = TaskFamily(
    describe="leave out repeats among as many digits as the difficulty (options: num_digits)",
    options=Options,
    difficulties=range(2, 33),
    make=make,
)
