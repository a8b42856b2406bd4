"""Close open brackets: `close ([]{` gives `})`."""

import random
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.data.task import Problem, TaskFamily

PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        num_kinds: Number of kinds of brackets.
    """

    num_kinds: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.num_kinds <= len(PAIRS):
            raise ConfigError(f"num_kinds of task 'brackets' is {self.num_kinds}; it must be 1 to {len(PAIRS)}.")


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with `difficulty` open brackets and 0 to `difficulty + 1` closed pairs at random positions."""
    kinds = list(PAIRS)[: options.num_kinds]
    still_open = rng.choices(kinds, k=difficulty)
    text = list(still_open)
    for _ in range(rng.randint(0, difficulty + 1)):
        position, kind = rng.randint(0, len(text)), rng.choice(kinds)
        text[position:position] = [kind, PAIRS[kind]]
    return Problem(
        family="brackets",
        difficulty=difficulty,
        prompt="close " + "".join(text),
        answer="".join(PAIRS[bracket] for bracket in reversed(still_open)),
    )


PLUGIN = TaskFamily(
    describe="close as many open brackets as the difficulty (options: num_kinds)",
    options=Options,
    difficulties=range(1, 17),
    make=make,
)
