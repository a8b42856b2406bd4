"""Parity of the number of ones: `par 1011` gives `1`, or with a scratchpad `1101=1`."""

import random
from dataclasses import dataclass

from openmimo.data.task import Problem, TaskFamily, exact_score, final_answer


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        scratchpad: Whether reference answers begin with the parity up to each digit. Only the final parity is scored.
    """

    scratchpad: bool = False


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with `difficulty` binary digits."""
    digits = rng.choices("01", k=difficulty)
    parities = [digits[: end + 1].count("1") % 2 for end in range(difficulty)]
    answer = str(parities[-1])
    if options.scratchpad:
        answer = "".join(map(str, parities)) + "=" + answer
    return Problem(family="parity", difficulty=difficulty, prompt="par " + "".join(digits), answer=answer)


def score(problem: Problem, text: str) -> float:
    """Return 1.0 if the text after the last `=`, or the whole text without one, is the parity, else 0.0."""
    return exact_score(problem.answer.rpartition("=")[2], final_answer(text).rpartition("=")[2])


PLUGIN = TaskFamily(
    describe="parity of as many binary digits as the difficulty (options: scratchpad)",
    options=Options,
    difficulties=range(6, 65),
    make=make,
    score=score,
)
