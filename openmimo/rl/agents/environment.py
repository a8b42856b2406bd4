"""What an environment is: one file in `openmimo/rl/environments` that exports `PLUGIN`, an Environment.

An environment has problems, and opens an episode for every sample of one. An episode gives the prompt; each time the
policy stops, it goes on with turns or text of its own (never learned from), or ends and has a reward. It sees text and
gives text: token ids are the rollout's, which never tokenizes anything twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from openmimo.core.config import from_dict
from openmimo.core.records import Message
from openmimo.core.registry import Registry
from openmimo.data.source import FileContent, Split
from openmimo.rl.scheduling.problems import Problem


@dataclass(frozen=True)
class EnvResponse:
    """What an episode says to a piece of the policy's writing.

    messages: turns of tools or users, after which the policy has its turn again. text: words to insert right there, so
    that the policy goes on in the same turn. Neither: the episode is over.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def is_last(self) -> bool:
        """Whether the episode is over."""
        return not self.messages and not self.text


@runtime_checkable
class Episode(Protocol):
    """One attempt at one problem. `respond`, `reward` and `close` may take long, and run in a thread then.

    Opening an episode, `respond` with the `reward` behind it, and `close` have a deadline each (`environment_seconds`
    of the run). A call that is late is given up: its sample is lost, or has the run's `timeout_reward`. Its thread
    cannot be killed, so what may hang for good belongs into a child process with a deadline of its own.

    messages: the conversation up to the policy's first turn. tools: function schemas of the chat template. stop:
    strings after which the policy stops for an answer, beside the end of its turn.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    stop: tuple[str, ...]

    def respond(self, text: str) -> EnvResponse:
        """Takes all that the policy wrote since the prompt or the last answer, without the token that ended it."""
        ...

    def reward(self) -> float:
        """A number from 0 to 1, once `respond` has said its last or the policy has come to its limit of tokens.

        An exception here or in `respond` counts as a failure of the infrastructure: the sample is rolled out again. A
        value that is no number from 0 to 1 ends the run.
        """
        ...

    def close(self) -> None:
        """Gives back what the episode holds, at whatever moment it ends."""
        ...


@runtime_checkable
class ReplacesContext(Protocol):
    """An episode whose conversation may give way to a shorter one (`rl/agents/context_management.py`)."""

    def successor(self) -> "Episode | None":
        """After its last answer, the episode that goes on and now owns what it holds; None: it is over."""
        ...


@dataclass(frozen=True)
class Environment:
    """One kind of episodes.

    Attributes:
        describe: One line for people.
        options: The frozen dataclass of its settings.
        problems: problems(options, split, seed) gives the function from an index to a problem, always the same one.
        open: open(problem, options) begins an episode.
        is_instant: is_instant(options) says whether episodes answer in microseconds, so that they need no thread.
        files: files(options) gives the files that the problems are read from, for a run that goes on later.
    """

    describe: str
    options: type
    problems: Callable[[Any, Split, int], Callable[[int], Problem]]
    open: Callable[[Problem, Any], Episode]
    is_instant: Callable[[Any], bool] = lambda options: True
    files: Callable[[Any], tuple[FileContent, ...]] = lambda options: ()


ENVIRONMENTS: Registry[Environment] = Registry("openmimo.rl.environments", Environment)


def open_environment(name: str, options: Mapping[str, Any]) -> tuple[Environment, Any]:
    """The plug-in of that name and its checked options. Raises ConfigError for an unknown name or option."""
    environment = ENVIRONMENTS.get(name)
    return environment, from_dict(environment.options, dict(options), where=f"options of environment {name!r}")
