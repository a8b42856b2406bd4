"""Evaluate logical expressions: `(1&0)|!1` gives `0`."""

import random
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Fraction
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        negation: Probability that an operand is negated.
        operators: A subset of `&`, `|` and `^` (exclusive or).
    """

    negation: Fraction = 0.3
    operators: str = "&|^"

    def __post_init__(self) -> None:
        if not self.operators or set(self.operators) - set("&|^"):
            raise ConfigError(f"operators of task 'boolean' are {self.operators!r}; they must be one or more of '&|^'.")


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make an expression with `difficulty` binary operators. All operations except the outermost have parentheses."""
    text, value = _expression(rng, difficulty, options)
    return Problem(family="boolean", difficulty=difficulty, prompt=text, answer=str(int(value)))


def _expression(rng: random.Random, num_operators: int, options: Options) -> tuple[str, bool]:
    if num_operators == 0:
        text, value = rng.choice((("0", False), ("1", True)))
    else:
        num_left = rng.randrange(num_operators)
        left_text, left = _operand(rng, num_left, options)
        right_text, right = _operand(rng, num_operators - 1 - num_left, options)
        operator = rng.choice(options.operators)
        text = left_text + operator + right_text
        value = {"&": left and right, "|": left or right, "^": left != right}[operator]
    return text, value


def _operand(rng: random.Random, num_operators: int, options: Options) -> tuple[str, bool]:
    text, value = _expression(rng, num_operators, options)
    text = f"({text})" if num_operators else text
    return ("!" + text, not value) if rng.random() < options.negation else (text, value)


PLUGIN = TaskFamily(
    describe="evaluate a logical expression of as many operators as the difficulty (options: negation, operators)",
    options=Options,
    difficulties=range(1, 17),
    make=make,
)
