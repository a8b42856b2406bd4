"""Problems of your own, in JSON Lines: each line has a prompt and an answer, and may have an id and a difficulty."""

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from openmimo.core.errors import DataError
from openmimo.data.answers import check_method, score_answer
from openmimo.data.json_lines import read_objects
from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """path: a file, or a folder of .jsonl files. scoring: how an answer is compared with the key ("exact": as text;
    "contains": found in the text; "numeric": the last number; "math": by math-verify). prompt_field, answer_field: the
    keys.
    """

    path: str
    scoring: Literal["exact", "contains", "numeric", "math"] = "exact"
    prompt_field: str = "prompt"
    answer_field: str = "answer"


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """One of the problems of that difficulty; those that name none belong to all. Raises DataError without any."""
    by_difficulty = _problems(options)
    candidates = by_difficulty.get(difficulty, ()) + by_difficulty.get(None, ())
    if not candidates:
        levels = ", ".join(map(str, sorted(level for level in by_difficulty if level is not None)))
        raise DataError(f"{options.path} has no problem of difficulty {difficulty}; it has {levels or 'none at all'}.")
    prompt, answer, problem_id = candidates[rng.randrange(len(candidates))]
    return Problem("jsonl", difficulty, prompt, answer, meta={"scoring": options.scoring}, id=problem_id)


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
    return score_answer(problem.meta["scoring"], problem.answer, text)


PLUGIN = TaskFamily(
    describe="problems from JSON Lines (options: path, scoring, prompt_field, answer_field)",
    options=Options,
    difficulties=range(0, 1001),
    make=make,
    score=score,
)
