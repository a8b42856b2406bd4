"""The tasks over `_grade_school`: solved problems, then a problem among irrelevant statements."""

import random
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, check_fields
from openmimo.core.records import Message
from openmimo.evals.task import Example, Room, Seed, Task
from openmimo.evals.tasks._filler import first
from openmimo.evals.tasks._grade_school import Level, Problem, draw_problem, irrelevant_statements

_ANSWER = re.compile(r"(?:answer:|solution:|oxed\{)\s*\$?(-?\d+)", re.IGNORECASE)
_SPARE_TOKENS = 32
_NOTE = (
    "Each problem states numbers of things. A kind that is never stated at a place has the number 0, and a total "
    "counts all kinds at a place{products}. Solve the problem step by step and end with 'Answer: ' and the number."
)
_PRODUCTS = ": for each kind, its number times its average"


@dataclass(frozen=True)
class Options:
    """Options of the tasks `gsm_medium` and `gsm_hard`.

    Attributes:
        min_operations: Fewest operations; an example has this number or 2, 4, 6, ... more.
        max_operations: Most operations.
        direction: "forward" asks for a total, "reverse" for a number that leads to a stated total; "both" is half each.
        shots: Solved problems before the question.
    """

    min_operations: Annotated[int, Bounds(least=2, most=30)] = 2
    max_operations: Annotated[int, Bounds(least=2, most=30)] = 10
    direction: Literal["both", "forward", "reverse"] = "both"
    shots: Annotated[int, Bounds(least=0, most=16)] = 5

    def __post_init__(self) -> None:
        check_fields(self, "options of the GSM tasks")
        if self.max_operations < self.min_operations:
            raise ConfigError(
                f"max_operations is {self.max_operations}; it must be at least min_operations, {self.min_operations}."
            )


def word_problem_task(level: Level) -> Task:
    """The task of one level."""

    def example(options: Options, room: Room, seed: Seed) -> Example:
        rng = random.Random(str(seed))
        *solved, asked = [_draw(options, level, rng) for _ in range(options.shots + 1)]
        shown = [f"{_problem_text(one, [], rng)}\nSolution: {one.solution}" for one in solved]
        note = _NOTE.format(products=_PRODUCTS if level == "hard" else "")

        def build(units: int) -> Example:
            filler = random.Random(f"{seed} filler")
            text = _problem_text(asked, first(irrelevant_statements(asked, filler), units), filler)
            return Example(
                turns=(Message("user", "\n\n".join([note, *shown, text])),),
                answer=f" {asked.solution}",
                max_tokens=room.answer_tokens(asked.solution, 0) + _SPARE_TOKENS,
                answer_start="\nSolution:",
                details={"number": asked.answer},
            )

        return room.fill(build)

    return Task(version=1, options=Options, example=example, score=score)


def score(example: Example, text: str) -> float:
    """1 if the integer after the first mark of an answer is right."""
    found = _ANSWER.search(text)
    return float(found is not None and int(found[1][:9]) == example.details["number"])


def _draw(options: Options, level: Level, rng: random.Random) -> Problem:
    operations = rng.choice(range(options.min_operations, options.max_operations + 1, 2))
    is_reverse = options.direction == "reverse" or (options.direction == "both" and rng.random() < 0.5)
    return draw_problem(rng, level, operations, reverse=is_reverse)


def _problem_text(problem: Problem, irrelevant: list[str], rng: random.Random) -> str:
    statements = problem.statements + irrelevant
    rng.shuffle(statements)
    return f"Problem: {' '.join(statements)} Question: {problem.question}"
