"""The interface of environments. Each is a file in `openmimo/rl/environments` that exports `PLUGIN`, an Environment.

An environment has problems, and opens an episode for each sample of a problem. The episode states the prompt. After
each policy turn it responds with messages or text, which the policy does not learn from, or it ends and has a reward.
Episodes read and write text; rollouts hold the token ids, and never tokenize the policy's text again.

A run keeps hashes of its problem files, so that a resumed run detects changed problems.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from openmimo.core.config import from_dict, to_dict
from openmimo.core.errors import CheckpointError
from openmimo.core.files import read_json, write_text_atomic
from openmimo.core.records import Message
from openmimo.core.registry import Registry
from openmimo.data.source import FileContent, Split
from openmimo.rl.config import RlSource
from openmimo.rl.scheduling.problems import Problem


@dataclass(frozen=True)
class EnvResponse:
    """The environment's response to one policy turn. Without messages and text, the episode is over.

    Attributes:
        messages: Turns of tools or users, after which the policy has its next turn.
        text: Text to insert, after which the policy continues the same turn.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def is_last(self) -> bool:
        """Whether the episode is over."""
        return not self.messages and not self.text


@runtime_checkable
class Episode(Protocol):
    """One attempt at one problem.

    Unless the environment is instant, `respond`, `reward` and `close` run in a thread, and other samples continue
    meanwhile. Opening, each `respond`, `reward` and `close` each have the run's `environment_seconds`; in an instant
    environment, the last `respond` and `reward` share it. A call that exceeds it fails: its sample is lost, or gets the
    run's `timeout_reward`. Threads cannot be killed, so work that may hang belongs in a child process with a time-out.

    Attributes:
        messages: The conversation up to the policy's first turn.
        tools: Function schemas for the chat template.
        stop: Strings after which the policy stops for a response, in addition to the end of its turn.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    stop: tuple[str, ...]

    def respond(self, text: str) -> EnvResponse:
        """Respond to the text of the policy since the prompt or the last response, without the token that ended it."""
        ...

    def reward(self) -> float:
        """The reward, from 0 to 1, after the last response or when the policy has reached its limit of tokens.

        An exception here or in `respond` is a failure of the infrastructure: the sample is rolled out again. Any value
        other than a number from 0 to 1 ends the run.
        """
        ...

    def close(self) -> None:
        """Release the resources of the episode. May be called after any other call."""
        ...


@runtime_checkable
class ReplacesContext(Protocol):
    """An episode whose conversation may be replaced by a shorter one (`rl/agents/context_management.py`)."""

    def successor(self) -> "Episode | None":
        """After the last response, the episode that continues and owns the resources; None if there is none."""
        ...


@dataclass(frozen=True)
class Environment:
    """One kind of episodes.

    Attributes:
        describe: One line of description.
        options: The frozen dataclass of its settings.
        problems: problems(options, split, seed) returns the function from an index to a problem, always the same one.
        open: open(problem, options) opens an episode.
        is_instant: is_instant(options) is whether episodes respond in microseconds, so that they need no thread.
        files: files(options) returns the files of the problems, which a resumed run checks.
    """

    describe: str
    options: type
    problems: Callable[[Any, Split, int], Callable[[int], Problem]]
    open: Callable[[Problem, Any], Episode]
    is_instant: Callable[[Any], bool] = lambda options: True
    files: Callable[[Any], tuple[FileContent, ...]] = lambda options: ()


ENVIRONMENTS: Registry[Environment] = Registry("openmimo.rl.environments", Environment)


def open_environment(name: str, options: Mapping[str, Any]) -> tuple[Environment, Any]:
    """The environment of that name, and its checked options. Raises ConfigError for an unknown name or option."""
    environment = ENVIRONMENTS.get(name)
    return environment, from_dict(environment.options, dict(options), where=f"options of environment {name!r}")


PROBLEMS_FILE = "problems.json"
Files = Mapping[str, tuple[FileContent, ...]]


def problem_files(sources: Sequence[RlSource]) -> dict[str, tuple[FileContent, ...]]:
    """The files of each source's problems with the hash of their content. Raises ConfigError or DataError."""
    found = {}
    for source in sources:
        environment, options = open_environment(source.environment, source.options)
        found[source.name] = environment.files(options)
    return found


def keep_problem_files(files: Files, run_folder: Path) -> None:
    """Saves the problem files of a new run."""
    write_text_atomic(run_folder / PROBLEMS_FILE, json.dumps(to_dict(files), indent=2) + "\n")


def check_same_problems(files: Files, run_folder: Path) -> None:
    """Raises CheckpointError if the run in `run_folder` was started on other problems. Files may have moved."""
    path = run_folder / PROBLEMS_FILE
    if not path.exists():
        return
    before = from_dict(dict[str, tuple[FileContent, ...]], read_json(path), where=str(path))
    for name, now in files.items():
        for old, new in zip(before.get(name, ()), now, strict=False):
            if old.sha256 != new.sha256:
                raise CheckpointError(
                    f"The problems or the reward of source {name!r} in {new.path} have changed: the run in "
                    f"{run_folder} was started on content {old.sha256[:12]}, read from {old.path}; now it is "
                    f"{new.sha256[:12]}. Restore the file, or set another run_folder for a new run."
                )
        if len(before.get(name, ())) != len(now):
            raise CheckpointError(
                f"The problems of source {name!r} now come from {len(now)} files, but the run in {run_folder} was "
                f"started on {len(before.get(name, ()))}. Use the same files, or set another run_folder for a new run."
            )
