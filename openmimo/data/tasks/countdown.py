"""Combine numbers to reach a target: an answer to `3,7,5=22` is `3*5+7`, or any other solution."""

import random
from dataclasses import dataclass
from typing import Annotated

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds
from openmimo.data.task import Problem, TaskFamily, final_answer
from openmimo.data.tasks._arithmetic import ExpressionError, evaluate


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        max_number: Largest number; the smallest is 1.
        max_target: Largest target.
    """

    max_number: int = 9
    max_target: Annotated[int, Bounds(least=2, most=10**6)] = 99

    def __post_init__(self) -> None:
        if not 1 <= self.max_number <= self.max_target // 2:
            raise ConfigError(
                f"Task 'countdown' has max_number {self.max_number} and max_target {self.max_target}; max_number must "
                "be at least 1 and at most half of max_target."
            )


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with `difficulty` numbers, each to be used exactly once, with `+ - * /` and parentheses."""
    numbers = [rng.randint(1, options.max_number) for _ in range(difficulty)]
    order = rng.sample(numbers, difficulty)
    text, value, is_sum = str(order[0]), order[0], False
    for number in order[1:]:
        results = {"+": value + number, "-": value - number, "*": value * number}
        sign = rng.choice([sign for sign, result in results.items() if 0 <= result <= options.max_target])
        if sign == "*" and is_sum:
            text = f"({text})"
        text, value, is_sum = f"{text}{sign}{number}", results[sign], sign != "*"
    return Problem(
        family="countdown",
        difficulty=difficulty,
        prompt=",".join(map(str, numbers)) + f"={value}",
        answer=text,
        meta={"numbers": tuple(numbers), "target": value},
    )


def score(problem: Problem, text: str) -> float:
    """Return 1.0 for an expression whose value is the target and which uses each number exactly once, else 0.0."""
    try:
        value, numbers = evaluate(final_answer(text))
    except ExpressionError:
        return 0.0
    return float(value == problem.meta["target"] and sorted(numbers) == sorted(problem.meta["numbers"]))


PLUGIN = TaskFamily(
    describe="reach a target with as many numbers as the difficulty (options: max_number, max_target)",
    options=Options,
    difficulties=range(2, 9),
    make=make,
    score=score,
)
