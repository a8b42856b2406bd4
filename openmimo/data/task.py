"""What a verifiable task is: a file in `openmimo/data/tasks` that exports `PLUGIN`, a TaskFamily.

A family makes problems of a wished difficulty and scores any answer to them. A task is a family with its settings; its
problems form an endless stream in which each has a number, so that a run can go on from where it stopped. Prompts are
divided by a hash into those to train on and those held out, whatever the seed.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from openmimo.core.config import from_dict
from openmimo.core.errors import ConfigError, DataError
from openmimo.core.records import Message
from openmimo.core.registry import Registry
from openmimo.data.config import TaskConfig
from openmimo.data.source import Split, split_of

HELD_OUT_FRACTION = 0.1
MAX_DRAWS = 1000


@dataclass(frozen=True)
class Problem:
    """One question with its answer key.

    difficulty: the family's level it was made for. answer: the reference answer, as a demonstration would write it.
    meta: what scoring needs beside the answer. id: by default a hash of family and prompt, the same in every run.
    """

    family: str
    difficulty: int
    prompt: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            digest = hashlib.blake2b(f"{self.family}\n{self.prompt}".encode(), digest_size=8)
            object.__setattr__(self, "id", digest.hexdigest())


@dataclass(frozen=True)
class TaskFamily:
    """A kind of problems.

    Attributes:
        describe: One line for people.
        options: The frozen dataclass of its settings.
        difficulties: The levels it has.
        make: make(rng, difficulty, options) gives a problem, from nothing but its arguments.
        score: score(problem, text) says how right the answer `text` is, from 0.0 to 1.0. The reference answer gives
            1.0, and no text raises. Text is never run: what only a library can judge goes through `runtime/isolated`.
        is_instant: is_instant(options) says whether scoring takes microseconds, so that it needs no thread.
    """

    describe: str
    options: type
    difficulties: range
    make: Callable[[random.Random, int, Any], Problem]
    score: Callable[[Problem, str], float]
    is_instant: Callable[[Any], bool] = lambda options: True


FAMILIES: Registry[TaskFamily] = Registry("openmimo.data.tasks", TaskFamily)


@dataclass(frozen=True)
class Task:
    """A family and its checked settings, from `open_task`."""

    config: TaskConfig
    family: TaskFamily
    options: Any

    def problem_at(self, index: int, *, split: Split, seed: int) -> Problem:
        """Problem number `index` of the endless stream of one split: a pure function of the task and the arguments.

        "train" and "validation" never share a prompt; a tenth of all prompts is in "validation". Raises DataError if
        there are too few different prompts to find one on the side asked for.
        """
        rng = random.Random(f"{seed} {index} {self.config.name}")
        difficulty = rng.randint(self.config.min_difficulty, self.config.max_difficulty)
        for _ in range(MAX_DRAWS):
            problem = self.family.make(rng, difficulty, self.options)
            if split_of(problem.prompt, HELD_OUT_FRACTION) == split:
                return problem
        raise DataError(
            f"Task {self.config.name!r} at difficulty {difficulty} has too few different prompts: none of {MAX_DRAWS} "
            f"draws is in the {split!r} split. Raise the difficulty or give it more problems."
        )

    def score(self, problem: Problem, text: str) -> float:
        """How right the answer `text` to `problem` is, from 0.0 to 1.0."""
        return self.family.score(problem, text)


def open_task(config: TaskConfig) -> Task:
    """The task that `config` names. Raises ConfigError for an unknown family, option or level of difficulty."""
    family = FAMILIES.get(config.name)
    levels = family.difficulties
    if config.min_difficulty not in levels or config.max_difficulty not in levels:
        raise ConfigError(
            f"Task {config.name!r} is asked for difficulties {config.min_difficulty} to {config.max_difficulty}, but "
            f"it has {levels[0]} to {levels[-1]}."
        )
    return Task(config, family, from_dict(family.options, config.options, where=f"options of task {config.name!r}"))


def problem_at(config: TaskConfig, index: int, *, split: Split, seed: int) -> Problem:
    """`Task.problem_at` of the task that `config` names."""
    return open_task(config).problem_at(index, split=split, seed=seed)


def prompt_messages(problem: Problem, system: str = "") -> list[Message]:
    """The conversation that asks `problem`.

    The system turn is there even if empty: without one, MiMo's template puts in its own, longer than a small problem.
    """
    return [Message("system", system), Message("user", problem.prompt)]
