"""Problems of your own, in JSON Lines: each line has a prompt and an answer, and may have an id and a difficulty."""

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from openmimo.core.errors import ConfigError, DataError
from openmimo.core.fields import NonNegativeFloat, check_fields
from openmimo.data.answers import check_method, is_instant, score_answer
from openmimo.data.json_lines import read_objects
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Where the problems are, and how answers are compared with their keys.

    Attributes:
        path: A file, or a folder of .jsonl files.
        scoring: "exact" (as text), "contains" (the key stands in the text, possibly among other candidates), "numeric"
            (the last number) or "math" (by math-verify).
        tolerance: For "numeric": the largest relative difference that counts as equal (0: none). A key that is an
            integer must be met exactly.
        prompt_field: The key of the prompt.
        answer_field: The key of the answer.
    """

    path: str
    scoring: Literal["exact", "contains", "numeric", "math"] = "exact"
    tolerance: NonNegativeFloat = 0.0
    prompt_field: str = "prompt"
    answer_field: str = "answer"

    def __post_init__(self) -> None:
        check_fields(self, "options of task 'jsonl'")
        if self.tolerance and self.scoring != "numeric":
            raise ConfigError(f"tolerance has no effect with scoring {self.scoring!r}; it belongs to 'numeric'.")


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """One of the problems of that difficulty; those that name none belong to all. Raises DataError without any."""
    by_difficulty = _problems(options)
    candidates = by_difficulty.get(difficulty, ()) + by_difficulty.get(None, ())
    if not candidates:
        levels = ", ".join(map(str, sorted(level for level in by_difficulty if level is not None)))
        raise DataError(f"{options.path} has no problem of difficulty {difficulty}; it has {levels or 'none at all'}.")
    prompt, answer, problem_id = candidates[rng.randrange(len(candidates))]
    meta = {"scoring": options.scoring, "tolerance": options.tolerance}
    return Problem("jsonl", difficulty, prompt, answer, meta=meta, id=problem_id)


@functools.lru_cache(maxsize=8)
def _problems(options: Options) -> Mapping[int | None, tuple[tuple[str, str, str], ...]]:
    """(prompt, answer, id) of all problems, by difficulty."""
    check_method(options.scoring)
    found: dict[int | None, list[tuple[str, str, str]]] = {}
    for where, row in read_objects(options.path):
        difficulty = row.get("difficulty")
        if difficulty is not None and (not isinstance(difficulty, int) or isinstance(difficulty, bool)):
            raise DataError(f"{where}: the difficulty must be a whole number, not {difficulty!r}.")
        prompt, answer = (_text(row, field, where) for field in (options.prompt_field, options.answer_field))
        found.setdefault(difficulty, []).append((prompt, answer, str(row.get("id", ""))))
    return {difficulty: tuple(problems) for difficulty, problems in found.items()}


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{where}: no text or number under {field!r} (found: {', '.join(row)}). Name the right keys by the options "
            "prompt_field and answer_field."
        )
    return value


def score(problem: Problem, text: str) -> float:
    """1.0 if the answer agrees with the key."""
    return score_answer(problem.meta["scoring"], problem.answer, text, tolerance=problem.meta["tolerance"])


PLUGIN = TaskFamily(
    describe="problems from JSON Lines (options: path, scoring, tolerance, prompt_field, answer_field)",
    options=Options,
    difficulties=range(0, 1001),
    make=make,
    score=score,
    is_instant=lambda options: is_instant(options.scoring),
)
