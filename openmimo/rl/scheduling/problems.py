"""Which problem comes next: streams with a cursor, means of a source, and the pool of problems that became easy.

Problems that every sample solved teach nothing for now, but dropping them for good makes training unstable: they go to
a pool, and a small share of the draws comes from there (MiMo-7B, section 3.3.2).
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from openmimo.rl.config import SchedulerConfig

_SOLVED = 1.0 - 1e-6


class Problem(NamedTuple):
    """What a stream gives. content: whatever the caller needs to roll it out and score it."""

    id: str
    content: Any = None


class Draw(NamedTuple):
    """A drawn problem. index: its place in the stream. easy: whether it came from the easy pool."""

    problem: Problem
    index: int
    easy: bool


class ProblemSource:
    """The problems of one source, in the order of their stream.

    stream: gives the problem at any index from 0 on, always the same one; a finite set goes round and round. Means are
    None until something is known.
    """

    def __init__(self, name: str, stream: Callable[[int], Problem], config: SchedulerConfig):
        self.name = name
        self.pass_rate: float | None = None
        self.acceptance = config.initial_acceptance
        self._stream = stream
        self._config = config
        self._cursor = 0
        self._num_draws = 0
        self._easy: dict[str, int] = {}

    @property
    def num_easy(self) -> int:
        """Problems in the easy pool."""
        return len(self._easy)

    @property
    def expected_acceptance(self) -> float:
        """The share of groups that is expected to be accepted, never below the configured minimum."""
        return max(self._config.min_acceptance, self.acceptance)

    def problem(self, index: int) -> Problem:
        """The problem at a place of the stream."""
        return Problem(*self._stream(index))

    def draw(self) -> Draw:
        """The next problem: one of the easy pool with its probability, else the next of the stream that is not easy."""
        self._num_draws += 1
        chance = random.Random(f"{self._config.seed}/{self.name}/{self._num_draws}")
        fraction = self._config.easy_fraction
        if fraction is not None and self._easy and chance.random() < fraction:
            index = chance.choice(list(self._easy.values()))
            return Draw(self.problem(index), index, True)
        # A stream in which all problems are easy has no other to find. Between two that are not easy, at most the whole
        # pool stands twice: at the end of one round and at the beginning of the next.
        for _ in range(2 * len(self._easy)):
            if self.problem(self._cursor).id not in self._easy:
                break
            self._cursor += 1
        self._cursor += 1
        return Draw(self.problem(self._cursor - 1), self._cursor - 1, False)

    def record(self, problem_id: str, *, index: int, reward: float, accepted: bool) -> None:
        """Takes note of a finished group: its mean reward, and whether it can be learned from."""
        config = self._config
        known = reward if self.pass_rate is None else self.pass_rate
        self.pass_rate = known + config.source_smoothing * (reward - known)
        self.acceptance += config.source_smoothing * (accepted - self.acceptance)
        self._easy.pop(problem_id, None)
        if config.easy_fraction is not None and reward >= _SOLVED:
            self._easy[problem_id] = index
        if len(self._easy) > config.remembered_problems:
            del self._easy[next(iter(self._easy))]

    def state(self) -> dict[str, Any]:
        """What to save for resuming, as plain JSON."""
        return {
            "cursor": self._cursor,
            "num_draws": self._num_draws,
            "pass_rate": self.pass_rate,
            "acceptance": self.acceptance,
            "easy": list(self._easy.items()),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._cursor = state["cursor"]
        self._num_draws = state["num_draws"]
        self.pass_rate = state["pass_rate"]
        self.acceptance = state["acceptance"]
        self._easy = dict(state["easy"])
