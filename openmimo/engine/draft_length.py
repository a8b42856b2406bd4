"""Chooses the number of drafting heads that gives the most tokens per second, from measurements.

More drafts mean more accepted tokens, with falling returns, and a more expensive step. Each number is tried a few times
per batch size (in powers of two), because a batch that fills the machine pays for every rejected token. Then the best
number is used, and a neighbor is tried every 128 steps. Acceptance and step times are running averages.
The choice changes speed only: the text is the same with any number of drafts.
"""

import math

_SMOOTHING = 0.1
_SLOWEST_LEARNING = 0.02
_STEPS_BETWEEN_TRIALS = 128
_STEPS_OF_A_TRIAL = 2
_FIRST_MEASUREMENTS = 3  # the fastest of these counts: the first steps may include one-time costs


class DraftLength:
    """The choice of one engine. With `adaptive=False` all heads always draft."""

    def __init__(self, num_heads: int, *, adaptive: bool):
        self._num_heads = num_heads
        self._adaptive = adaptive
        self._acceptance = [0.5] * num_heads
        self._num_judged = [0] * num_heads
        self._seconds: dict[int, list[float]] = {}
        self._num_measured: dict[int, list[int]] = {}
        self._steps = 0

    def choose(self, batch_size: int) -> int:
        """The number of heads that draft for the next step of `batch_size` sequences."""
        if not self._adaptive or not self._num_heads:
            return self._num_heads
        seconds, num_measured = self._measurements(batch_size)
        untried = [count for count, number in enumerate(num_measured) if number < _FIRST_MEASUREMENTS]
        if untried:
            return untried[-1]
        self._steps += 1
        best = max(range(self._num_heads + 1), key=lambda count: (self._tokens_per_step(count) / seconds[count], count))
        trial, step = divmod(self._steps, _STEPS_BETWEEN_TRIALS)
        if trial and step < _STEPS_OF_A_TRIAL:
            return min(best + 1, self._num_heads) if trial % 2 else max(best - 1, 0)
        return best

    def observe(self, batch_size: int, num_drafts: int, seconds: float) -> None:
        """Records the wall time of a step that verified `num_drafts` drafts per sequence and proposed as many."""
        averages, num_measured = self._measurements(batch_size)
        old = averages[num_drafts]
        if num_measured[num_drafts] < _FIRST_MEASUREMENTS:
            averages[num_drafts] = min(old, seconds)
        else:  # other processes may have delayed the step, so its time is capped at twice the average
            averages[num_drafts] += _SMOOTHING * (min(seconds, 2 * old) - old)
        num_measured[num_drafts] += 1

    def judge(self, num_offered: int, num_accepted: int) -> None:
        """Records one verification, in which the first `num_accepted` of `num_offered` drafts were accepted."""
        for head in range(min(num_accepted + 1, num_offered)):
            self._num_judged[head] += 1
            rate = max(1 / (self._num_judged[head] + 1), _SLOWEST_LEARNING)
            self._acceptance[head] += rate * ((head < num_accepted) - self._acceptance[head])

    def _tokens_per_step(self, count: int) -> float:
        tokens, chance = 1.0, 1.0
        for acceptance in self._acceptance[:count]:
            chance *= acceptance
            tokens += chance
        return tokens

    def _measurements(self, batch_size: int) -> tuple[list[float], list[int]]:
        """Seconds per step and number of measurements, each by the number of drafts."""
        size, counts = batch_size.bit_length(), self._num_heads + 1
        return self._seconds.setdefault(size, [math.inf] * counts), self._num_measured.setdefault(size, [0] * counts)
