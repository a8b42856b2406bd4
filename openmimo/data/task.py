"""What a verifiable task is: a file in `openmimo/data/tasks` that exports `PLUGIN`, a TaskFamily.

A family makes problems of a wished difficulty and scores any answer to them. A task is a family with its settings; its
problems form an endless stream in which each has a number, so that a run can go on from where it stopped. Prompts are
divided by a hash into those to train on and those held out, for every seed. A finite set of problems comes in epochs.
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
from openmimo.data.permutation import permuted
from openmimo.data.source import FileContent, Split, split_of
from openmimo.data.tokenizer import THINK_END

HELD_OUT_FRACTION = 0.1
MAX_DRAWS = 1000  # on the smaller side of that fraction


@dataclass(frozen=True)
class Problem:
    """One question with its answer key.

    difficulty: the family's level it was made for. answer: the reference answer, as a demonstration would write it.
    meta: what scoring needs beyond the answer. id: by default a hash of family and prompt, the same in every run.
    turns: the conversation that asks, where it is more than the prompt; the prompt names it then, and is not shown.
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

    by_difficulty: those of each level, in the order of the files; those under None belong to every level. held_out: the
    same for a set of its own to validate on; None where a part of the first is held out. files: where they are read.
    """

    by_difficulty: Mapping[int | None, tuple[Problem, ...]]
    held_out: Mapping[int | None, tuple[Problem, ...]] | None
    files: tuple[FileContent, ...]


def final_answer(text: str) -> str:
    """Returns the text after the reasoning, stripped."""
    return text.rpartition(THINK_END)[2].strip()


def exact_score(answer: str, text: str) -> float:
    """Returns 1.0 if the final answer of `text` is `answer`, up to surrounding white space; else 0.0."""
    return float(final_answer(text) == answer.strip())


def answer_score(problem: Problem, text: str) -> float:
    """Returns the `exact_score` of the reference answer."""
    return exact_score(problem.answer, text)


@dataclass(frozen=True)
class TaskFamily:
    """A kind of problems.

    Attributes:
        describe: One line for people.
        options: The frozen dataclass of its settings.
        difficulties: The levels it has.
        make: make(rng, difficulty, options) gives a problem, from nothing but its arguments.
        score: score(problem, text) says how right the answer `text` is, from 0.0 to 1.0. The reference answer gives
            1.0, and no text raises. The default compares the text with the reference answer. Text is never run: what
            only a library can judge goes through `runtime/isolated`.
        is_instant: is_instant(options) says whether scoring takes microseconds, so that it needs no thread.
        problem_set: problem_set(options) gives all problems, for a finite family. Raises DataError.
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
    """A family and its checked settings, from `open_task`.

    held_out_fraction: the share of all prompts that is in the "validation" split. What is trained on never holds the
    problems of the usual share (`HELD_OUT_FRACTION`), so that later stages can measure on them.
    """

    config: TaskConfig
    family: TaskFamily
    options: Any
    held_out_fraction: float = HELD_OUT_FRACTION

    def problem_at(self, index: int, *, split: Split, seed: int) -> Problem:
        """Problem number `index` of the endless stream of one split: a pure function of the task and the arguments.

        "train" and "validation" never share a prompt. A finite set comes in epochs, each with every problem once, in an
        order of seed and epoch. Raises DataError if no problem is found on the side asked for.
        """
        if self.family.problem_set is not None:
            problems = self._train_set if split == "train" else self._validation_set
            epoch, place = divmod(index, len(problems))
            digest = hashlib.blake2b(f"{seed} {epoch} {self.config.name}".encode(), digest_size=8).digest()
            return problems[permuted(place, len(problems), int.from_bytes(digest, "big"))]
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
            f"draws is in the {split!r} split. Raise the difficulty or give it more problems."
        )

    def score(self, problem: Problem, text: str) -> float:
        """How right the answer `text` to `problem` is, from 0.0 to 1.0."""
        return self.family.score(problem, text)

    @property
    def files(self) -> tuple[FileContent, ...]:
        """What the problems are read from; nothing if they are generated."""
        return () if self.family.problem_set is None else self.family.problem_set(self.options).files

    @functools.cached_property
    def _train_set(self) -> tuple[Problem, ...]:
        known = self.family.problem_set(self.options)
        problems = self._of_difficulty(known.by_difficulty)
        if known.held_out is not None:
            prompts = {problem.prompt for level in known.held_out.values() for problem in level}
            chosen = tuple(problem for problem in problems if problem.prompt not in prompts)
        else:
            fraction = self._fraction("train")
            chosen = tuple(problem for problem in problems if split_of(problem.prompt, fraction) == "train")
        return self._not_empty(chosen, problems, "train")

    @functools.cached_property
    def _validation_set(self) -> tuple[Problem, ...]:
        known = self.family.problem_set(self.options)
        if known.held_out is not None:
            return self._of_difficulty(known.held_out)
        problems = self._of_difficulty(known.by_difficulty)
        fraction = self._fraction("validation")
        chosen = tuple(problem for problem in problems if split_of(problem.prompt, fraction) == "validation")
        return self._not_empty(chosen, problems, "validation")

    def _fraction(self, split: Split) -> float:
        return self.held_out_fraction if split == "validation" else max(self.held_out_fraction, HELD_OUT_FRACTION)

    def _of_difficulty(self, by_difficulty: Mapping[int | None, tuple[Problem, ...]]) -> tuple[Problem, ...]:
        """The problems of the wanted levels and those without one, which get the lowest that is wanted."""
        lowest, highest = self.config.min_difficulty, self.config.max_difficulty
        found = [replace(problem, difficulty=lowest) for problem in by_difficulty.get(None, ())]
        for level in sorted(level for level in by_difficulty if level is not None):
            found.extend(by_difficulty[level] if lowest <= level <= highest else ())
        if not found:
            levels = ", ".join(map(str, sorted(level for level in by_difficulty if level is not None)))
            wanted = f"difficulty {lowest}" + (f" to {highest}" if highest > lowest else "")
            raise DataError(f"{self._place} has no problem of {wanted}; it has {levels or 'none at all'}.")
        return tuple(found)

    def _not_empty(
        self, chosen: tuple[Problem, ...], problems: tuple[Problem, ...], split: Split
    ) -> tuple[Problem, ...]:
        if not chosen:
            raise DataError(
                f"None of the {len(problems)} problems of {self._place} is in the {split!r} split, which a hash of the "
                f"prompt decides ({self._fraction(split):g} are held out). Give it more problems, or a file of its own "
                "to validate on as option 'test_path'."
            )
        return chosen

    @property
    def _place(self) -> str:
        return " and ".join(file.path for file in self.files)


def open_task(config: TaskConfig, *, held_out_fraction: float = HELD_OUT_FRACTION) -> Task:
    """The task that `config` names. Raises ConfigError for an unknown family, option or level of difficulty."""
    family = FAMILIES.get(config.name)
    levels = family.difficulties
    if config.min_difficulty not in levels or config.max_difficulty not in levels:
        raise ConfigError(
            f"Task {config.name!r} is asked for difficulties {config.min_difficulty} to {config.max_difficulty}, but "
            f"it has {levels[0]} to {levels[-1]}."
        )
    options = from_dict(family.options, config.options, where=f"options of task {config.name!r}")
    return Task(config, family, options, held_out_fraction)


def problem_at(config: TaskConfig, index: int, *, split: Split, seed: int) -> Problem:
    """`Task.problem_at` of the task that `config` names."""
    return open_task(config).problem_at(index, split=split, seed=seed)


def prompt_messages(problem: Problem, system: str = "") -> list[Message]:
    """The conversation that asks `problem`.

    The system turn is there even if empty: without one, MiMo's template puts in its own, longer than a small problem.
    A system turn of the problem's own takes the place of `system`.
    """
    turns = list(problem.turns) or [Message("user", problem.prompt)]
    return turns if turns[0].role == "system" else [Message("system", system), *turns]
