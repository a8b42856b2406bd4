"""Problems from JSON Lines or Parquet files.

Each line has a prompt (or `messages`, the turns up to the question) and an answer, and may have an id, a difficulty and
a system turn. The problems are repeated in epochs. Problems with the same prompt are in the same split.

With the option `reward`, a function of the user scores the answers: `score(problem, text)` gets the object of the line
and the final answer, and returns a number from 0 to 1. Such lines may have any other keys, and need no answer.
"""

import functools
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openmimo.core.errors import ConfigError, DataError
from openmimo.core.fields import NonNegativeFloat, check_fields
from openmimo.core.records import Message
from openmimo.core.registry import load_object
from openmimo.data.objects import object_files, read_objects
from openmimo.data.source import FileContent, fingerprint_files
from openmimo.data.task import Problem, ProblemSet, TaskFamily, final_answer
from openmimo.data.tasks._answers import check_method, is_instant, score_answer

ByDifficulty = Mapping[int | None, tuple[Problem, ...]]


@dataclass(frozen=True)
class Options:
    """Location of the problems, and the comparison of answers with keys.

    Attributes:
        path: A file of JSON Lines (.jsonl, .jsonl.gz, .json.gz) or Parquet, or a folder of one of these kinds.
        test_path: File or folder of the validation problems (empty: a tenth of the prompts of `path` is held out).
        scoring: "exact" (as text), "contains" (the key occurs in the text, possibly among other candidates), "numeric"
            (the last number) or "math" (by math-verify).
        tolerance: For "numeric": maximum relative difference (0: none). A key that is an integer must be matched
            exactly.
        prompt_field: JSON key of the prompt.
        answer_field: JSON key of the answer.
        reward: Function of your own that scores answers in place of `scoring`: `path/file.py:function` or
            `package.module:function` (empty: none).
    """

    path: str
    test_path: str = ""
    scoring: Literal["exact", "contains", "numeric", "math"] = "exact"
    tolerance: NonNegativeFloat = 0.0
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    reward: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "options of task 'jsonl'")
        if self.tolerance and self.scoring != "numeric":
            raise ConfigError(f"tolerance has no effect with scoring {self.scoring!r}; it requires 'numeric'.")
        if self.reward and self.scoring != "exact":
            raise ConfigError(f"scoring {self.scoring!r} has no effect with reward {self.reward!r}; omit one of them.")
        if self.reward and not self.reward.rpartition(":")[0]:
            raise ConfigError(f"reward is {self.reward!r}; it must be like my_reward.py:score.")


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Return a random problem of that difficulty from either split.

    Only for wrong answers and length estimates: training and evaluation use `problem_set`.
    """
    by_difficulty = problem_set(options).by_difficulty
    candidates = by_difficulty.get(difficulty, ()) + by_difficulty.get(None, ())
    if not candidates:
        raise DataError(f"{options.path} has no problem of difficulty {difficulty}.")
    return candidates[rng.randrange(len(candidates))]


def problem_set(options: Options) -> ProblemSet:
    """Read all problems, or return the cached ones if no file has changed. Raises DataError with file and line."""
    _reward_function(options.reward)
    paths = [path for path in (options.path, options.test_path) if path]
    if reward_files := _reward_files(options.reward):
        paths.append(reward_files[0].path)
    return _read(options, tuple(fingerprint_files(object_files(path)) for path in paths))


@functools.lru_cache(maxsize=4)
def _read(options: Options, fingerprints: tuple[str, ...]) -> ProblemSet:
    check_method(options.scoring)
    by_difficulty, file = _read_path(options, options.path)
    code = _reward_files(options.reward)
    if not options.test_path:
        return ProblemSet(by_difficulty, None, (file, *code))
    held_out, test_file = _read_path(options, options.test_path)
    return ProblemSet(by_difficulty, held_out, (file, test_file, *code))


def _reward_files(reward: str) -> tuple[FileContent, ...]:
    """The file of a reward function, which a run that goes on must find as it was; none for a module."""
    path = Path(reward.rpartition(":")[0]).expanduser()
    return (FileContent(str(path), hashlib.sha256(path.read_bytes()).hexdigest()),) if path.suffix == ".py" else ()


def _read_path(options: Options, path: str) -> tuple[ByDifficulty, FileContent]:
    """Read the problems of one path, and hash their content."""
    found: dict[int | None, list[Problem]] = {}
    digest = hashlib.sha256()
    prompts: dict[str, str] = {}
    for where, difficulty, problem in _problems(options, path):
        if prompts.setdefault(problem.id, problem.prompt) != problem.prompt:
            raise DataError(
                f"{where}: another problem above has the id {problem.id!r}. Give each problem a different id, or none."
            )
        turns = [[turn.role, turn.content] for turn in problem.turns]
        content = [difficulty, problem.prompt, problem.answer, problem.id, turns]
        digest.update(json.dumps([*content, problem.meta["row"]] if options.reward else content).encode())
        found.setdefault(difficulty, []).append(problem)
    if not found:
        raise DataError(f"{path} contains no problem.")
    return {level: tuple(problems) for level, problems in found.items()}, FileContent(path, digest.hexdigest())


def _problems(options: Options, path: str) -> Iterator[tuple[str, int | None, Problem]]:
    """Yield (file and line, difficulty or None, problem) for each line."""
    for where, row in read_objects(path):
        difficulty = row.get("difficulty")
        if difficulty is not None and (not isinstance(difficulty, int) or isinstance(difficulty, bool)):
            raise DataError(f"{where}: the difficulty must be a whole number, not {difficulty!r}.")
        has_answer = not options.reward or options.answer_field in row
        answer = _text(row, options.answer_field, where) if has_answer else ""
        name, turns = _id(row, where), _turns(row, where)
        if turns and options.prompt_field in row:
            raise DataError(f"{where}: there are both {options.prompt_field!r} and 'messages'. Remove one.")
        if turns:
            prompt = json.dumps([[turn.role, turn.content] for turn in turns], ensure_ascii=False)
        else:
            prompt = _text(row, options.prompt_field, where)
        if (system := row.get("system")) is not None:
            if not isinstance(system, str) or (turns and turns[0].role == "system"):
                raise DataError(f"{where}: 'system' must be text, and the only system turn.")
            turns = (Message("system", system), *(turns or (Message("user", prompt),)))
        meta: dict[str, Any] = {"scoring": options.scoring, "tolerance": options.tolerance}
        if options.reward:
            meta = {"reward": options.reward, "row": row}
        yield where, difficulty, Problem("jsonl", difficulty or 0, prompt, answer, meta=meta, id=name, turns=turns)


def _turns(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """Return the turns under `messages`: roles system (first only), user and assistant. The last is a user turn."""
    if "messages" not in row:
        return ()
    roles, turns = ("system", "user", "assistant"), row["messages"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: 'messages' must be a list of turns.")
    for number, turn in enumerate(turns):
        if turn.get("role") not in roles[number > 0 :] or not isinstance(turn.get("content"), str) or len(turn) != 2:
            raise DataError(
                f"{where}: turn {number + 1} of 'messages' must have a 'role' ({', '.join(roles[number > 0 :])}) and a "
                "'content' that is text, and nothing else."
            )
    if turns[-1]["role"] != "user":
        raise DataError(f"{where}: the last turn of 'messages' must be the user's.")
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


def _id(row: Mapping[str, Any], where: str) -> str:
    value = row.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(f"{where}: the id must be text or a whole number, not {value!r}.")
    return str(value)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value, field, where)
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{where}: no text or number under {field!r} (found: {', '.join(row) or 'nothing'}). Rename the "
            "keys to 'prompt' and 'answer', or set the options prompt_field and answer_field."
        )
    return value


def _number(value: int | float, field: str, where: str) -> str:
    try:
        if math.isfinite(value):
            return str(value)
    except (OverflowError, ValueError):  # an integer above the range of float, or with too many digits for str
        pass
    raise DataError(f"{where}: the number under {field!r} is too large. Write it as text.")


def _reward_function(name: str) -> Callable[[Mapping[str, Any], str], float] | None:
    """The user's function; None without a name. Raises ConfigError."""
    if not name:
        return None
    function = load_object(name)
    if not callable(function):
        raise ConfigError(f"reward {name!r} is a {type(function).__name__}, not a function.")
    return function


def score(problem: Problem, text: str) -> float:
    """Return 1.0 if the answer matches the key, else 0.0; with `reward`, what that function returns or raises."""
    if "reward" in problem.meta:
        function = _reward_function(problem.meta["reward"])
        assert function is not None
        return function(dict(problem.meta["row"]), final_answer(text))
    return score_answer(problem.meta["scoring"], problem.answer, text, tolerance=problem.meta["tolerance"])


PLUGIN = TaskFamily(
    describe=(
        "problems from JSON Lines (options: path, test_path, scoring, tolerance, prompt_field, answer_field, reward)"
    ),
    options=Options,
    difficulties=range(0, 1001),
    make=make,
    score=score,
    is_instant=lambda options: not options.reward and is_instant(options.scoring),
    problem_set=problem_set,
)
