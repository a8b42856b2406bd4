"""Convert decimal numbers to another base: `25>b3` gives `221`."""

import random
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        min_base: Smallest base.
        max_base: Largest base, at most 9.
    """

    min_base: int = 2
    max_base: int = 9

    def __post_init__(self) -> None:
        if not 2 <= self.min_base <= self.max_base <= 9:
            raise ConfigError(
                f"Task 'base_conversion' has bases {self.min_base} to {self.max_base}; they must be within 2 to 9."
            )


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with a number of `difficulty` decimal digits."""
    number = rng.randrange(10 ** (difficulty - 1), 10**difficulty)
    base = rng.randint(options.min_base, options.max_base)
    return Problem(
        family="base_conversion", difficulty=difficulty, prompt=f"{number}>b{base}", answer=_in_base(number, base)
    )


def _in_base(number: int, base: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, base)
        digits = str(digit) + digits
    return digits


PLUGIN = TaskFamily(
    describe="write a number of as many digits as the difficulty in another base (options: min_base, max_base)",
    options=Options,
    difficulties=range(1, 11),
    make=make,
)
