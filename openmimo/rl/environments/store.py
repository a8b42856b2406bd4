"""A key-value store, for tiny models: the policy writes `<get k>` and `<set k v>`, and results are inserted.

The values are hidden, so they must be read before they can be copied. The reward depends on the final state only.
"""

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openmimo.core.errors import ConfigError
from openmimo.core.records import Message
from openmimo.data.source import Split
from openmimo.rl.agents.environment import Environment, EnvResponse
from openmimo.rl.agents.problem_stream import Question, check_difficulties, problem_stream
from openmimo.rl.scheduling.problems import Problem

DIFFICULTIES = range(1, 9)


@dataclass(frozen=True)
class Options:
    """Options of environment `store`.

    Attributes:
        min_difficulty: Instructions in the easiest problems (1 to 8).
        max_difficulty: Instructions in the hardest ones.
        keys: Number of keys, starting at `a` (2 to 26).
        max_calls: Number of calls after which the episode ends.
        distinct: Number of distinct problems, which repeat in order (0: unlimited new ones).
        system: The system message.
    """

    min_difficulty: int = 1
    max_difficulty: int = 2
    keys: int = 26
    max_calls: int = 48
    distinct: int = 0
    system: str = ""

    def __post_init__(self) -> None:
        check_difficulties("store", self.min_difficulty, self.max_difficulty, DIFFICULTIES)
        if not 2 <= self.keys <= 26 or self.max_calls < 1:
            raise ConfigError("keys of the store must be 2 to 26, and max_calls at least 1.")


@dataclass(frozen=True)
class Chores:
    """A problem.

    Attributes:
        prompt: Instructions such as `copy a b, swap c d`.
        before: Initial (key, value) pairs.
        after: Expected (key, value) pairs.
    """

    prompt: str
    before: tuple[tuple[str, str], ...]
    after: tuple[tuple[str, str], ...]


class StoreEpisode:
    """An attempt on one store."""

    tools: tuple[Mapping[str, Any], ...] = ()
    stop: tuple[str, ...] = (">",)

    def __init__(self, content: Chores, options: Options):
        self.messages: tuple[Message, ...] = (Message("system", options.system), Message("user", content.prompt))
        self._values, self._expected = dict(content.before), dict(content.after)
        self._calls_left = options.max_calls

    def respond(self, text: str) -> EnvResponse:
        """Inserts the result of a call. Text without a call ends the episode."""
        written, end, _ = text.partition(">")
        if not end or self._calls_left <= 0:
            return EnvResponse()
        self._calls_left -= 1
        return EnvResponse(text=f"={self._result(written.rpartition('<')[2].split())};")

    def reward(self) -> float:
        """1 if every value of the store is as expected, else 0."""
        return float(self._values == self._expected)

    def close(self) -> None:
        """Nothing to release."""

    def _result(self, words: list[str]) -> str:
        match words:
            case ["get" | "set", key, *_] if key not in self._values:
                return f"error: no key {key}"
            case ["get", key]:
                return self._values[key]
            case ["set", key, value]:
                self._values[key] = value
                return "ok"
        return "error: write <get key> or <set key value>"


def make(rng: random.Random, difficulty: int, options: Options) -> Question | None:
    """`difficulty` copies and swaps; None if their combined effect is nothing."""
    keys = string.ascii_lowercase[: options.keys]
    before = {key: str(value) for key, value in zip(keys, rng.sample(range(10, 100), len(keys)), strict=True)}
    after, lines = dict(before), []
    for _ in range(difficulty):
        first, second = rng.sample(keys, 2)
        verb = rng.choice(("copy", "swap"))
        lines.append(f"{verb} {first} {second}")
        after[first], after[second] = after[second] if verb == "swap" else after[first], after[first]
    if before == after:
        return None
    content = Chores(", ".join(lines), tuple(before.items()), tuple(after.items()))
    return Question(content.prompt, content, str(content.before))


def problems(options: Options, split: Split, seed: int) -> Callable[[int], Problem]:
    """The numbered problems of a split: generated key-value stores."""
    return problem_stream(
        "store",
        lambda rng, difficulty: make(rng, difficulty, options),
        difficulties=(options.min_difficulty, options.max_difficulty),
        distinct=options.distinct,
        split=split,
        seed=seed,
    )


def open_episode(problem: Problem, options: Options) -> StoreEpisode:
    """A new episode of a problem."""
    return StoreEpisode(problem.content, options)


PLUGIN = Environment(
    describe="a key-value store to rearrange by calls in the text, for tiny models",
    options=Options,
    problems=problems,
    open=open_episode,
)
