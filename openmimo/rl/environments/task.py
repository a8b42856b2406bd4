"""Verifiable tasks as episodes of one turn. The task's answer key scores the response."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openmimo.core.fields import NonNegativeInt
from openmimo.core.records import Message
from openmimo.data.config import TaskConfig
from openmimo.data.source import FileContent, Split
from openmimo.data.task import Problem as TaskProblem
from openmimo.data.task import Task, open_task, prompt_messages
from openmimo.rl.agents.environment import Environment, EnvResponse
from openmimo.rl.scheduling.problems import Problem


@dataclass(frozen=True)
class Options:
    """Options of environment `task`.

    Attributes:
        task: The task and its difficulty.
        distinct: Number of distinct problems, which repeat in order (0: unlimited new ones).
        system: The system message.
    """

    task: TaskConfig
    distinct: NonNegativeInt = 0
    system: str = ""


class TaskEpisode:
    """An episode of one question and one response."""

    tools: tuple[Mapping[str, Any], ...] = ()
    stop: tuple[str, ...] = ()

    def __init__(self, task: Task, problem: TaskProblem, system: str):
        self.messages: tuple[Message, ...] = tuple(prompt_messages(problem, system))
        self._task, self._problem, self._text = task, problem, ""

    def respond(self, text: str) -> EnvResponse:
        self._text = text
        return EnvResponse()

    def reward(self) -> float:
        """The score of the response. A response that was cut off at the token limit is scored as it is."""
        return self._task.score(self._problem, self._text)

    def close(self) -> None:
        """Nothing to release."""


def problems(options: Options, split: Split, seed: int) -> Callable[[int], Problem]:
    """The problem stream of a task, or its first `distinct` problems in a cycle."""
    task = open_task(options.task)

    def problem_at(index: int) -> Problem:
        problem = task.problem_at(index % options.distinct if options.distinct else index, split=split, seed=seed)
        return Problem(problem.id, problem)

    return problem_at


def files(options: Options) -> tuple[FileContent, ...]:
    """The files of the problems; none if they are generated."""
    return open_task(options.task).files


def open_episode(problem: Problem, options: Options) -> TaskEpisode:
    """An attempt at a problem of `problems`."""
    return TaskEpisode(open_task(options.task), problem.content, options.system)


def is_instant(options: Options) -> bool:
    """Whether the task scores responses in microseconds."""
    task = open_task(options.task)
    return task.family.is_instant(task.options)


PLUGIN = Environment(
    describe="verifiable tasks of one turn (options: task, distinct, system)",
    options=Options,
    problems=problems,
    open=open_episode,
    is_instant=is_instant,
    files=files,
)
