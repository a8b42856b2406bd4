"""Chained arithmetic with a calculator, for tiny models: the policy writes `<c>12*7</c>`, and the result is inserted.

The response is one turn: text, calls with their results, and the final number.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openmimo.core.errors import ConfigError
from openmimo.core.records import Message
from openmimo.data.source import Split
from openmimo.data.task import exact_score
from openmimo.data.tasks._arithmetic import ExpressionError, evaluate
from openmimo.rl.agents.environment import Environment, EnvResponse
from openmimo.rl.agents.problem_stream import Question, check_difficulties, problem_stream
from openmimo.rl.scheduling.problems import Problem

CALL, END_OF_CALL = "<c>", "</c>"
DIFFICULTIES = range(1, 13)


@dataclass(frozen=True)
class Options:
    """Options of environment `calculator`.

    Attributes:
        min_difficulty: Operations in the easiest problems (1 to 12).
        max_difficulty: Operations in the hardest ones.
        largest: Largest operand of additions and subtractions; factors have one digit.
        operations_per_call: Operations per call (0: no limit).
        max_calls: Number of calls after which the episode ends.
        distinct: Number of distinct problems, which repeat in order (0: unlimited new ones).
        system: The system message.
    """

    min_difficulty: int = 2
    max_difficulty: int = 3
    largest: int = 99
    operations_per_call: int = 1
    max_calls: int = 16
    distinct: int = 0
    system: str = ""

    def __post_init__(self) -> None:
        check_difficulties("calculator", self.min_difficulty, self.max_difficulty, DIFFICULTIES)
        if self.largest < 1 or self.max_calls < 1:
            raise ConfigError("largest and max_calls of the calculator must be at least 1.")


@dataclass(frozen=True)
class Sum:
    """A problem: an expression such as `((12*7)+5)-3`, and its value."""

    expression: str
    answer: str


class CalculatorEpisode:
    """One expression, step by step."""

    tools: tuple[Mapping[str, Any], ...] = ()
    stop: tuple[str, ...] = (END_OF_CALL,)

    def __init__(self, content: Sum, options: Options):
        self.messages: tuple[Message, ...] = (
            Message("system", options.system),
            Message("user", content.expression),
        )
        self._answer, self._options = content.answer, options
        self._text, self._calls_left = "", options.max_calls

    def respond(self, text: str) -> EnvResponse:
        """Inserts the result of a call. The text after the last call is the answer."""
        self._text = text
        if END_OF_CALL not in text:
            return EnvResponse()
        if self._calls_left <= 0:
            return EnvResponse()
        self._calls_left -= 1
        written, _, _ = text.partition(END_OF_CALL)
        before, mark, expression = written.rpartition(CALL)
        return EnvResponse(text=f"={self._result(expression) if mark else f'error: there is no {CALL}'};")

    def reward(self) -> float:
        return exact_score(self._answer, self._text)

    def close(self) -> None:
        """Nothing to release."""

    def _result(self, expression: str) -> str:
        try:
            value, numbers = evaluate(expression)
        except ExpressionError as error:
            return f"error: {error}"
        most = self._options.operations_per_call
        if most and len(numbers) > most + 1:
            return f"error: at most {most} at once"
        return str(value)


def make(rng: random.Random, difficulty: int, options: Options) -> Question:
    """A chain of `difficulty` operations, each on the previous result."""
    expression = str(rng.randint(1, options.largest))
    for step in range(difficulty):
        sign = rng.choice("+-*")
        number = rng.randint(2, 9) if sign == "*" else rng.randint(1, options.largest)
        expression = f"({expression}){sign}{number}" if step else f"{expression}{sign}{number}"
    return Question(expression, Sum(expression, str(evaluate(expression)[0])))


def problems(options: Options, split: Split, seed: int) -> Callable[[int], Problem]:
    """The numbered problems of a split: chained arithmetic."""
    return problem_stream(
        "calculator",
        lambda rng, difficulty: make(rng, difficulty, options),
        difficulties=(options.min_difficulty, options.max_difficulty),
        distinct=options.distinct,
        split=split,
        seed=seed,
    )


def open_episode(problem: Problem, options: Options) -> CalculatorEpisode:
    """A new episode of a problem."""
    return CalculatorEpisode(problem.content, options)


PLUGIN = Environment(
    describe="chained arithmetic with calculator calls in the text, for tiny models",
    options=Options,
    problems=problems,
    open=open_episode,
)
