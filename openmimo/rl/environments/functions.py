"""Function calling on generated applications (paper section 4.3.2): chains of functions, rewarded by the final state.

Explicit edges: the output of a function is the input of the next one, because ids are available no other way. Implicit
edges: some records are locked, which only the error reveals, and must be unlocked by another function first. Each
problem has its own application with functions and hidden records.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openmimo.core.errors import ConfigError
from openmimo.core.records import Message
from openmimo.data.source import Split
from openmimo.rl.agents.chat_tools import ChatToolEpisode, function_tool
from openmimo.rl.agents.environment import Environment
from openmimo.rl.agents.problem_stream import Question, check_difficulties, problem_stream
from openmimo.rl.scheduling.problems import Problem
from openmimo.rl.toolbox import ToolMistakeError

DIFFICULTIES = range(1, 7)
NOUNS = (
    "account", "album", "booking", "camera", "claim", "contract", "course", "device", "flight", "folder", "garage",
    "invoice", "lease", "locker", "machine", "order", "parcel", "permit", "project", "room", "sensor", "shipment",
    "ticket", "vehicle",
)  # fmt: skip
NAMES = (
    "Abena", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kavya", "Lucia", "Mateo",
    "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tove", "Umar", "Vera", "Wanda", "Yusuf", "Zofia",
)  # fmt: skip
STATUSES = ("active", "held", "archived", "urgent", "reviewed", "paused")


@dataclass(frozen=True)
class Options:
    """Options of environment `functions`.

    Attributes:
        min_difficulty: Links from the named record to the record to change, in the easiest problems (1 to 6).
        max_difficulty: The same in the hardest ones.
        goals: Number of records to change (1 to 4).
        locked_share: Share of locked records.
        max_calls: Number of calls after which the episode ends.
        distinct: Number of distinct problems, which repeat in order (0: unlimited new ones).
        system: The system message, before the functions.
    """

    min_difficulty: int = 1
    max_difficulty: int = 3
    goals: int = 1
    locked_share: float = 0.5
    max_calls: int = 40
    distinct: int = 0
    system: str = ""

    def __post_init__(self) -> None:
        check_difficulties("functions", self.min_difficulty, self.max_difficulty, DIFFICULTIES)
        if not 1 <= self.goals <= 4 or not 0.0 <= self.locked_share <= 1.0 or self.max_calls < 1:
            raise ConfigError("goals must be 1 to 4, locked_share 0 to 1, and max_calls at least 1.")


@dataclass(frozen=True)
class Application:
    """A generated application and its task.

    Attributes:
        prompt: The task.
        nouns: The kinds of records, from the kind with names to the kind with a status.
        names: Name to record of the first kind.
        links: Record to its record of the next kind.
        statuses: Record of the last kind to status.
        locked: Locked records of the last kind.
        goals: Requested (name, status) pairs.
    """

    prompt: str
    nouns: tuple[str, ...]
    names: Mapping[str, str]
    links: Mapping[str, str]
    statuses: Mapping[str, str]
    locked: frozenset[str]
    goals: tuple[tuple[str, str], ...]

    def target(self, name: str) -> str:
        """The record of the last kind that is linked to the name."""
        record = self.names[name]
        while record in self.links:
            record = self.links[record]
        return record

    def expected(self) -> dict[str, str]:
        """The expected final statuses."""
        return {**self.statuses, **{self.target(name): status for name, status in self.goals}}


class FunctionsEpisode(ChatToolEpisode):
    """An attempt on one task in one application."""

    def __init__(self, content: Application, options: Options):
        turns = (Message("system", options.system), Message("user", content.prompt))
        super().__init__(turns, functions_of(content.nouns), options.max_calls)
        self._application = content
        self._statuses, self._locked = dict(content.statuses), set(content.locked)

    def run(self, name: str, arguments: Mapping[str, Any]) -> str:
        verb, _, rest = name.partition("_")
        first, *_, last = self._application.nouns
        if verb == "find":
            return self._known(self._application.names, arguments["name"], first)
        if verb == "get":
            noun = rest.partition("_of_")[2]
            return self._known(self._application.links, arguments[f"{noun}_id"], noun)
        record = arguments[f"{last}_id"]
        self._known(self._statuses, record, last)
        if verb == "unlock":
            self._locked.discard(record)
            return f"{record} is unlocked"
        if record in self._locked:
            raise ToolMistakeError(f"{record} is locked")
        if verb == "delete":
            del self._statuses[record]
            return f"{record} is deleted"
        if arguments["status"] not in STATUSES:
            raise ToolMistakeError(f"there is no such status; there are {', '.join(STATUSES)}")
        self._statuses[record] = arguments["status"]
        return f"{record} is {arguments['status']}"

    def reward(self) -> float:
        """1 if every status of the application is as expected, else 0."""
        return float(self._statuses == self._application.expected())

    def _known(self, table: Mapping[str, str], key: str, noun: str) -> str:
        if key not in table or (table is self._application.links and not key.startswith(f"{noun}-")):
            raise ToolMistakeError(f"there is no {noun} {key!r}")
        return table[key]


def functions_of(nouns: Sequence[str]) -> list[dict[str, Any]]:
    """The schemas of an application's functions."""
    first, last = nouns[0], nouns[-1]
    found = [function_tool(f"find_{first}", f"The id of a {first}.", {"name": ("string", "whose it is")})]
    for noun, following in zip(nouns, nouns[1:], strict=False):
        text = f"The id of the {following} of a {noun}."
        found.append(function_tool(f"get_{following}_of_{noun}", text, _handle(noun)))
    status = {"status": ("string", ", ".join(STATUSES))}
    found.append(function_tool(f"set_{last}", f"Sets a {last}'s status.", _handle(last) | status))
    found.append(function_tool(f"unlock_{last}", f"Unlocks a {last}.", _handle(last)))
    found.append(function_tool(f"delete_{last}", f"Deletes a {last}.", _handle(last)))
    return found


def _handle(noun: str) -> dict[str, tuple[str, str]]:
    return {f"{noun}_id": ("string", f"the {noun}'s id")}


def make(rng: random.Random, difficulty: int, options: Options) -> Question:
    """A problem whose application has a chain of `difficulty` links."""
    nouns = tuple(rng.sample(NOUNS, difficulty + 1))
    numbers = iter(rng.sample(range(0x1000, 0x10000), 6 * len(nouns)))
    records = [[f"{noun}-{next(numbers):x}" for _ in range(6)] for noun in nouns]
    names = dict(zip(rng.sample(NAMES, 6), records[0], strict=True))
    links: dict[str, str] = {}
    for these, following in zip(records, records[1:], strict=False):
        links |= zip(these, rng.sample(following, len(following)), strict=True)
    statuses = {record: rng.choice(STATUSES) for record in records[-1]}
    locked = frozenset(record for record in records[-1] if rng.random() < options.locked_share)
    application = Application("", nouns, names, links, statuses, locked, ())
    goals = tuple(
        (name, rng.choice([status for status in STATUSES if status != statuses[application.target(name)]]))
        for name in rng.sample(sorted(names), options.goals)
    )
    owned = " of the ".join(reversed(nouns))
    lines = [f"Set the status of the {owned} of {name} to {status}." for name, status in goals]
    prompt = " ".join([*lines, "Change no other status."])
    content = Application(prompt, nouns, names, links, statuses, locked, goals)
    return Question(prompt, content, f"{names} {links} {statuses} {sorted(locked)}")


def problems(options: Options, split: Split, seed: int) -> Callable[[int], Problem]:
    """The numbered problems of a split: generated applications."""
    return problem_stream(
        "functions",
        lambda rng, difficulty: make(rng, difficulty, options),
        difficulties=(options.min_difficulty, options.max_difficulty),
        distinct=options.distinct,
        split=split,
        seed=seed,
    )


def open_episode(problem: Problem, options: Options) -> FunctionsEpisode:
    """A new episode of a problem."""
    return FunctionsEpisode(problem.content, options)


PLUGIN = Environment(
    describe="function calling on generated applications with hidden state, judged by the final state",
    options=Options,
    problems=problems,
    open=open_episode,
)
