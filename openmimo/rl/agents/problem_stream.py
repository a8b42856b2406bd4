"""Unlimited streams of generated problems for environments. Training and validation share no prompt."""

import hashlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.source import Split, split_of
from openmimo.data.task import HELD_OUT_FRACTION, MAX_DRAWS
from openmimo.rl.scheduling.problems import Problem


class Question(NamedTuple):
    """A generated problem.

    Attributes:
        prompt: The text for the policy.
        content: The problem for the environment.
        hidden: Text of the hidden part, which enters the id.
    """

    prompt: str
    content: Any
    hidden: str = ""


def problem_stream(
    name: str,
    make: Callable[[random.Random, int], Question | None],
    *,
    difficulties: tuple[int, int],
    distinct: int,
    split: Split,
    seed: int,
) -> Callable[[int], Problem]:
    """Returns the function from an index to a problem. It is a pure function of the arguments.

    Args:
        name: The environment.
        make: `make(rng, difficulty)` returns a problem, or None if the draw failed.
        difficulties: Lowest and highest difficulty, drawn uniformly.
        distinct: Number of distinct problems, which repeat in order (0: unlimited new ones).
        split: The split of the prompts. The returned function raises DataError if it finds no such prompt.
        seed: Of the stream.
    """

    def problem_at(index: int) -> Problem:
        number = index % distinct if distinct else index
        rng = random.Random(f"{name} {seed} {number}")
        difficulty = rng.randint(*difficulties)
        for _ in range(MAX_DRAWS):
            question = make(rng, difficulty)
            if question is not None and split_of(question.prompt, HELD_OUT_FRACTION) == split:
                text = f"{name}\n{question.prompt}\n{question.hidden}"
                return Problem(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), question.content)
        raise DataError(
            f"Environment {name!r} at difficulty {difficulty} has too few different prompts: none of {MAX_DRAWS} draws "
            f"is in the {split!r} split. Raise the difficulty."
        )

    return problem_at


def check_difficulties(where: str, lowest: int, highest: int, allowed: range) -> None:
    """Raises ConfigError unless lowest <= highest, both in `allowed`."""
    if lowest > highest or lowest not in allowed or highest not in allowed:
        raise ConfigError(
            f"{where} has min_difficulty {lowest} and max_difficulty {highest}; they must be in order and within "
            f"{allowed[0]} to {allowed[-1]}."
        )
