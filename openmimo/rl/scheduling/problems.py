"""Which problem comes next: streams with a cursor, pass rates, and the pool of problems that became easy.

Problems that every sample solved teach nothing for now, but dropping them for good makes training unstable: they go to
a pool, and a small share of the draws comes from there (MiMo-7B, section 3.3.2).

A draw takes the next problem of the stream and steps over two kinds:

    stream   a  b  c  d  a  b  c  d ...        easy pool {b}, pass rate of c below min_pass_rate
    draws    a        d  a     c  d ...        b comes from the pool; c comes again by chance (revisit_fraction)

So the pass rate of every problem of a finite stream is measured again and again, while the policy changes.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from openmimo.rl.config import SchedulerConfig

_EQUAL = 1e-6
_SOLVED = 1.0 - _EQUAL


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
    None until something is known. num_passed_over: problems that draws stepped over for their pass rate.
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
        self._pass_rates: dict[str, float] = {}  # the problems that were seen last come last
        self.num_passed_over = 0

    @property
    def num_easy(self) -> int:
        """Problems in the easy pool."""
        return len(self._easy)

    @property
    def expected_acceptance(self) -> float:
        """The share of groups that is expected to be accepted, never below the configured minimum."""
        return max(self._config.min_acceptance, self.acceptance)

    @property
    def num_known(self) -> int:
        """Problems whose pass rate is known."""
        return len(self._pass_rates)

    @property
    def share_never_solved(self) -> float:
        """Of the problems with a known pass rate, the share whose pass rate is 0."""
        return sum(rate <= _EQUAL for rate in self._pass_rates.values()) / max(1, self.num_known)

    def problem_pass_rate(self, problem_id: str) -> float | None:
        """The running mean of the rewards of a problem; None if it is not known."""
        return self._pass_rates.get(problem_id)

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
        # A stream in which all problems are stepped over has no other to find. Between two that are not, at most all of
        # them stand twice: at the end of one round and at the beginning of the next.
        for _ in range(2 * (len(self._easy) + self._num_outside())):
            problem_id = self.problem(self._cursor).id
            if problem_id not in self._easy:
                if self._is_inside(self._pass_rates.get(problem_id)) or self._is_revisited():
                    break
                self.num_passed_over += 1
            self._cursor += 1
        self._cursor += 1
        return Draw(self.problem(self._cursor - 1), self._cursor - 1, False)

    def record(self, problem_id: str, *, index: int, reward: float, accepted: bool) -> None:
        """Takes note of a finished group: its mean reward, and whether it can be learned from."""
        config = self._config
        known = reward if self.pass_rate is None else self.pass_rate
        self.pass_rate = known + config.source_smoothing * (reward - known)
        self.acceptance += config.source_smoothing * (accepted - self.acceptance)
        known = self._pass_rates.pop(problem_id, reward)
        self._pass_rates[problem_id] = known + config.problem_smoothing * (reward - known)
        self._easy.pop(problem_id, None)
        if config.easy_fraction is not None and reward >= _SOLVED:
            self._easy[problem_id] = index
        for memory in (self._pass_rates, self._easy):
            if len(memory) > config.remembered_problems:
                del memory[next(iter(memory))]

    def _is_inside(self, pass_rate: float | None) -> bool:
        """Whether problems of that pass rate are drawn. One that is not known is."""
        return pass_rate is None or self._config.min_pass_rate <= pass_rate <= self._config.max_pass_rate

    def _num_outside(self) -> int:
        if self._config.min_pass_rate == 0.0 and self._config.max_pass_rate == 1.0:
            return 0
        return sum(not self._is_inside(rate) for rate in self._pass_rates.values())

    def _is_revisited(self) -> bool:
        """Whether the problem at the cursor is drawn although its pass rate is outside the limits."""
        chance = random.Random(f"{self._config.seed}/{self.name}/revisit/{self._cursor}")
        return chance.random() < self._config.revisit_fraction

    def state(self) -> dict[str, Any]:
        """What to save for resuming, as plain JSON."""
        return {
            "cursor": self._cursor,
            "num_draws": self._num_draws,
            "pass_rate": self.pass_rate,
            "acceptance": self.acceptance,
            "easy": list(self._easy.items()),
            "pass_rates": list(self._pass_rates.items()),
            "num_passed_over": self.num_passed_over,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._cursor = state["cursor"]
        self._num_draws = state["num_draws"]
        self.pass_rate = state["pass_rate"]
        self.acceptance = state["acceptance"]
        self._easy = dict(state["easy"])
        self._pass_rates = dict(state.get("pass_rates", ()))
        self.num_passed_over = state.get("num_passed_over", 0)
