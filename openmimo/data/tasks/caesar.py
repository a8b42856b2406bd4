"""Shift letters along the alphabet: `rot2 abz` gives `cdb`."""

import random
import string
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        max_shift: Largest shift; the smallest is 1.
    """

    max_shift: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.max_shift <= 25:
            raise ConfigError(f"max_shift of task 'caesar' is {self.max_shift}; it must be between 1 and 25.")


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with `difficulty` letters."""
    alphabet = string.ascii_lowercase
    letters = rng.choices(alphabet, k=difficulty)
    shift = rng.randint(1, options.max_shift)
    return Problem(
        family="caesar",
        difficulty=difficulty,
        prompt=f"rot{shift} " + "".join(letters),
        answer="".join(alphabet[(alphabet.index(letter) + shift) % 26] for letter in letters),
    )


PLUGIN = TaskFamily(
    describe="shift as many letters as the difficulty along the alphabet (options: max_shift)",
    options=Options,
    difficulties=range(2, 33),
    make=make,
)
