"""The order of problems: streams with a cursor, pass rates, and the pool of easy problems.

Problems that every sample solves teach nothing for now, but dropping them for good makes training unstable. They go to
a pool, and a small share of the draws comes from it (MiMo-7B, section 3.3.2).

A draw takes the next problem of the stream and skips two kinds:

    stream   a  b  c  d  a  b  c  d ...        easy pool {b}, pass rate of c below min_pass_rate
    draws    a        d  a     c  d ...        b is drawn from the pool; c is drawn by chance (revisit_fraction)

So the pass rate of every problem of a finite stream is measured repeatedly while the policy changes.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from openmimo.rl.config import SchedulerConfig

_EQUAL = 1e-6
_SOLVED = 1.0 - _EQUAL


class Problem(NamedTuple):
    """A problem of a stream.

    Attributes:
        id: Equal for equal problems.
        content: The data that an environment needs to open and score an episode.
    """

    id: str
    content: Any = None


class Draw(NamedTuple):
    """A drawn problem.

    Attributes:
        problem: The problem.
        stream_index: Its index in the stream.
        easy: Whether it was drawn from the easy pool.
    """

    problem: Problem
    stream_index: int
    easy: bool


class ProblemSource:
    """The problems of one source, in the order of their stream.

    Attributes:
        name: The source.
        pass_rate: The running mean reward of its groups; None before the first.
        acceptance: The running share of groups with rewards that the policy can learn from.
        num_passed_over: How often draws skipped a problem for its pass rate.
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
        self._pass_rates: dict[str, float] = {}  # the most recently seen problem is last
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
        """Problems with a known pass rate."""
        return len(self._pass_rates)

    @property
    def share_never_solved(self) -> float:
        """The share of problems with pass rate 0 among those with a known pass rate."""
        return sum(rate <= _EQUAL for rate in self._pass_rates.values()) / max(1, self.num_known)

    def problem_pass_rate(self, problem_id: str) -> float | None:
        """The running mean reward of a problem; None if it is unknown."""
        return self._pass_rates.get(problem_id)

    def problem(self, index: int) -> Problem:
        """The problem at an index of the stream."""
        return Problem(*self._stream(index))

    def draw(self) -> Draw:
        """Draw from the easy pool with the configured probability, otherwise the next problem of the stream."""
        self._num_draws += 1
        chance = random.Random(f"{self._config.seed}/{self.name}/{self._num_draws}")
        fraction = self._config.easy_fraction
        if fraction is not None and self._easy and chance.random() < fraction:
            index = chance.choice(list(self._easy.values()))
            return Draw(self.problem(index), index, True)
        # If all problems of the stream are skipped, the search must end. Otherwise each skipped problem is seen at most
        # twice before one that is not skipped: at the end of one pass over a finite stream, and at the next start.
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
        """Update the means with a finished group.

        Args:
            problem_id: Its problem.
            index: The index of the problem in the stream.
            reward: Its mean reward.
            accepted: Whether the policy can learn from it.
        """
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
        """Whether problems of that pass rate are drawn; an unknown pass rate is."""
        return pass_rate is None or self._config.min_pass_rate <= pass_rate <= self._config.max_pass_rate

    def _num_outside(self) -> int:
        if self._config.min_pass_rate == 0.0 and self._config.max_pass_rate == 1.0:
            return 0
        return sum(not self._is_inside(rate) for rate in self._pass_rates.values())

    def _is_revisited(self) -> bool:
        """Whether the problem at the cursor is drawn although its pass rate is outside the limits."""
        chance = random.Random(f"{self._config.seed}/{self.name}/revisit/{self._cursor}")
        return chance.random() < self._config.revisit_fraction

    def means(self) -> dict[str, float]:
        """Statistics over the run.

        acceptance and pass_rate (if known); easy_pool, known_problems and never_solved_share (among these);
        passed_over, the draws that skipped a problem for its pass rate.
        """
        means = {
            "acceptance": self.acceptance,
            "easy_pool": self.num_easy,
            "known_problems": self.num_known,
            "never_solved_share": self.share_never_solved,
            "passed_over": self.num_passed_over,
        }
        return means if self.pass_rate is None else means | {"pass_rate": self.pass_rate}

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain JSON values."""
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
        """Continue from a result of `state`."""
        self._cursor = state["cursor"]
        self._num_draws = state["num_draws"]
        self.pass_rate = state["pass_rate"]
        self.acceptance = state["acceptance"]
        self._easy = dict(state["easy"])
        self._pass_rates = dict(state.get("pass_rates", ()))
        self.num_passed_over = state.get("num_passed_over", 0)
