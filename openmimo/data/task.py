"""Verifiable tasks: problems with answer keys. Each file of `openmimo/data/tasks` exports a TaskFamily as `PLUGIN`.

A family generates problems of a given difficulty and scores any answer to them. A task is a family with its options.
Its problems form an infinite, numbered stream, so that a run can resume at any position. A hash of the prompt assigns
each problem to the training split or the held-out split, independently of the seed. A finite problem set is repeated in
epochs.
"""

import functools
import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from openmimo.core.config import from_dict
from openmimo.core.errors import ConfigError, DataError
from openmimo.core.records import Message
from openmimo.core.registry import Registry
from openmimo.data.config import TaskConfig
from openmimo.data.mixing import permuted
from openmimo.data.source import FileContent, Split, split_of
from openmimo.data.tokenizer import THINK_END

HELD_OUT_FRACTION = 0.1
MAX_DRAWS = 1000  # for the smaller split of that fraction


@dataclass(frozen=True)
class Problem:
    """One question with its answer key.

    Attributes:
        family: Name of the task family.
        difficulty: Difficulty level within the family.
        prompt: The question. If `turns` is not empty, it only identifies the problem and is not shown.
        answer: The reference answer, in the form that a demonstration has.
        meta: Additional data for scoring.
        id: Identifier; by default a hash of family and prompt, which is the same in every run.
        turns: The conversation up to the question, if it is more than the prompt.
    """

    family: str
    difficulty: int
    prompt: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    turns: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        if not self.id:
            digest = hashlib.blake2b(f"{self.family}\n{self.prompt}".encode(), digest_size=8)
            object.__setattr__(self, "id", digest.hexdigest())


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a finite family.

    Attributes:
        by_difficulty: Problems by level, in the order of the files. Problems under None belong to every level.
        held_out: Problems of a separate validation set, by level. None if a part of `by_difficulty` is held out.
        files: The files that contain the problems.
    """

    by_difficulty: Mapping[int | None, tuple[Problem, ...]]
    held_out: Mapping[int | None, tuple[Problem, ...]] | None
    files: tuple[FileContent, ...]


def final_answer(text: str) -> str:
    """Return the text after the reasoning, without surrounding white space."""
    return text.rpartition(THINK_END)[2].strip()


def exact_score(answer: str, text: str) -> float:
    """Return 1.0 if the final answer of `text` equals `answer` up to surrounding white space, else 0.0."""
    return float(final_answer(text) == answer.strip())


def answer_score(problem: Problem, text: str) -> float:
    """Return the `exact_score` of `text` against the reference answer."""
    return exact_score(problem.answer, text)


@dataclass(frozen=True)
class TaskFamily:
    """A generator of problems of one kind, and the scorer of their answers.

    Attributes:
        describe: One-line description.
        options: Frozen dataclass of the family's options.
        difficulties: Supported difficulty levels.
        make: make(rng, difficulty, options) returns a problem, as a pure function of its arguments.
        score: score(problem, text) returns the score of the answer `text`, from 0.0 to 1.0. The reference answer
            scores 1.0, and no text raises (a reward function of the user may). The default compares the text with the
            reference answer. The text is never executed in this process: libraries that may do so are called through
            `runtime/isolated`.
        is_instant: is_instant(options) returns whether scoring takes microseconds, so that it needs no thread.
        problem_set: problem_set(options) returns all problems of a finite family; None for an infinite one. Raises
            DataError.
    """

    describe: str
    options: type
    difficulties: range
    make: Callable[[random.Random, int, Any], Problem]
    score: Callable[[Problem, str], float] = answer_score
    is_instant: Callable[[Any], bool] = lambda options: True
    problem_set: Callable[[Any], ProblemSet] | None = None


FAMILIES: Registry[TaskFamily] = Registry("openmimo.data.tasks", TaskFamily)


@dataclass(frozen=True)
class Task:
    """A family with its validated options; made by `open_task`.

    Attributes:
        config: Name, difficulties and options of the task.
        family: The task's family.
        options: Instance of the family's options.
        held_out_fraction: Fraction of all prompts in the "validation" split. The training split always excludes
            the default fraction (`HELD_OUT_FRACTION`), so that later phases can evaluate on it.
    """

    config: TaskConfig
    family: TaskFamily
    options: Any
    held_out_fraction: float = HELD_OUT_FRACTION

    def problem_at(self, index: int, *, split: Split, seed: int) -> Problem:
        """Return problem number `index` of the infinite stream of one split, as a pure function of task and arguments.

        "train" and "validation" never share a prompt. An epoch of a finite set contains every problem once, in an order
        that depends on seed and epoch.

        Raises:
            DataError: The split has no problems, or none was found in the maximum number of draws.
        """
        if self.family.problem_set is not None:
            problems = self._train_set if split == "train" else self._validation_set
            epoch, position = divmod(index, len(problems))
            digest = hashlib.blake2b(f"{seed} {epoch} {self.config.name}".encode(), digest_size=8).digest()
            return problems[permuted(position, len(problems), int.from_bytes(digest, "big"))]
        rng = random.Random(f"{seed} {index} {self.config.name}")
        difficulty = rng.randint(self.config.min_difficulty, self.config.max_difficulty)
        fraction = self._fraction(split)
        share = fraction if split == "validation" else 1.0 - fraction
        draws = math.ceil(MAX_DRAWS * HELD_OUT_FRACTION / share) if share else 0
        for _ in range(draws):
            problem = self.family.make(rng, difficulty, self.options)
            if split_of(problem.prompt, fraction) == split:
                return problem
        raise DataError(
            f"Task {self.config.name!r} at difficulty {difficulty} has too few different prompts: none of {draws} "
            f"draws is in the {split!r} split. Increase the difficulty or the number of problems."
        )

    def score(self, problem: Problem, text: str) -> float:
        """Score the answer `text` to `problem`, from 0.0 to 1.0."""
        return self.family.score(problem, text)

    @property
    def files(self) -> tuple[FileContent, ...]:
        """The files that contain the problems; empty if they are generated."""
        return () if self.family.problem_set is None else self.family.problem_set(self.options).files

    @functools.cached_property
    def _train_set(self) -> tuple[Problem, ...]:
        assert self.family.problem_set is not None
        problem_set = self.family.problem_set(self.options)
        problems = self._of_difficulty(problem_set.by_difficulty)
        if problem_set.held_out is not None:
            prompts = {problem.prompt for level in problem_set.held_out.values() for problem in level}
            chosen = tuple(problem for problem in problems if problem.prompt not in prompts)
        else:
            fraction = self._fraction("train")
            chosen = tuple(problem for problem in problems if split_of(problem.prompt, fraction) == "train")
        return self._not_empty(chosen, problems, "train")

    @functools.cached_property
    def _validation_set(self) -> tuple[Problem, ...]:
        assert self.family.problem_set is not None
        problem_set = self.family.problem_set(self.options)
        if problem_set.held_out is not None:
            return self._of_difficulty(problem_set.held_out)
        problems = self._of_difficulty(problem_set.by_difficulty)
        fraction = self._fraction("validation")
        chosen = tuple(problem for problem in problems if split_of(problem.prompt, fraction) == "validation")
        return self._not_empty(chosen, problems, "validation")

    def _fraction(self, split: Split) -> float:
        return self.held_out_fraction if split == "validation" else max(self.held_out_fraction, HELD_OUT_FRACTION)

    def _of_difficulty(self, by_difficulty: Mapping[int | None, tuple[Problem, ...]]) -> tuple[Problem, ...]:
        """Return the problems of the task's levels, and those without a level, which get the task's lowest."""
        lowest, highest = self.config.min_difficulty, self.config.max_difficulty
        found = [replace(problem, difficulty=lowest) for problem in by_difficulty.get(None, ())]
        for level in sorted(level for level in by_difficulty if level is not None):
            found.extend(by_difficulty[level] if lowest <= level <= highest else ())
        if not found:
            levels = ", ".join(map(str, sorted(level for level in by_difficulty if level is not None)))
            requested = f"difficulty {lowest}" + (f" to {highest}" if highest > lowest else "")
            raise DataError(f"{self._file_names} has no problem of {requested}; it has {levels or 'none at all'}.")
        return tuple(found)

    def _not_empty(
        self, chosen: tuple[Problem, ...], problems: tuple[Problem, ...], split: Split
    ) -> tuple[Problem, ...]:
        if not chosen:
            raise DataError(
                f"None of the {len(problems)} problems of {self._file_names} is in the {split!r} split, to which a "
                f"hash of the prompt assigns them ({self._fraction(split):g} are held out). Add problems, or give a "
                "separate validation file as option 'test_path' (--test-problems)."
            )
        return chosen

    @property
    def _file_names(self) -> str:
        return " and ".join(file.path for file in self.files)


def open_task(config: TaskConfig, *, held_out_fraction: float = HELD_OUT_FRACTION) -> Task:
    """Open the task of `config`. Raises ConfigError for an unknown family, option or difficulty level."""
    family = FAMILIES.get(config.name)
    levels = family.difficulties
    if config.min_difficulty not in levels or config.max_difficulty not in levels:
        raise ConfigError(
            f"The config of task {config.name!r} has difficulties {config.min_difficulty} to {config.max_difficulty}, "
            f"but it has {levels[0]} to {levels[-1]}."
        )
    options: Any = from_dict(family.options, config.options, where=f"options of task {config.name!r}")
    return Task(config, family, options, held_out_fraction)


def problem_at(config: TaskConfig, index: int, *, split: Split, seed: int) -> Problem:
    """Return `Task.problem_at` of the task of `config`."""
    return open_task(config).problem_at(index, split=split, seed=seed)


def prompt_messages(problem: Problem, system: str = "") -> list[Message]:
    """Return the conversation that ends with the question of `problem`.

    It always has a system turn, possibly empty: without one, MiMo's template inserts its default system prompt, which
    is longer than a small problem. A system turn of the problem replaces `system`.
    """
    turns = list(problem.turns) or [Message("user", problem.prompt)]
    return turns if turns[0].role == "system" else [Message("system", system), *turns]
