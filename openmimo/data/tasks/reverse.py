"""Reverse letters: `rev abcd` gives `dcba`."""

import random
import string
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        num_letters: Number of different letters, starting at `a`.
    """

    num_letters: int = 26

    def __post_init__(self) -> None:
        if not 2 <= self.num_letters <= 26:
            raise ConfigError(f"num_letters of task 'reverse' is {self.num_letters}; it must be between 2 and 26.")


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with `difficulty` letters."""
    letters = "".join(rng.choices(string.ascii_lowercase[: options.num_letters], k=difficulty))
    return Problem(family="reverse", difficulty=difficulty, prompt="rev " + letters, answer=letters[::-1])


PLUGIN = TaskFamily(
    describe="reverse as many letters as the difficulty (options: num_letters)",
    options=Options,
    difficulties=range(2, 33),
    make=make,
)
