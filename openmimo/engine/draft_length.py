"""How many heads should draft: the number that gives the most tokens a second, by what was measured.

More drafts mean more accepted tokens, with falling returns, and a dearer step. Each number is tried a few times for
each size of batch, because a batch that fills the machine pays for every token that it verifies in vain; then the best
is used, and a neighbor is tried now and then. Acceptance and step times are running averages.
The choice changes speed only: the text is the same with any number of drafts.
"""

import math

_SMOOTHING = 0.1
_SLOWEST_LEARNING = 0.02
_STEPS_BETWEEN_TRIALS = 128
_STEPS_OF_A_TRIAL = 2
_FIRST_LOOKS = 3  # the fastest of these counts: the first steps of a kind may pay for things that happen once


class DraftLength:
    """Chooses for one engine. adaptive: False always drafts with all heads."""

    def __init__(self, num_heads: int, *, adaptive: bool):
        self._num_heads = num_heads
        self._adaptive = adaptive
        self._acceptance = [0.5] * num_heads
        self._num_judged = [0] * num_heads
        self._seconds: dict[int, list[float]] = {}
        self._num_looks: dict[int, list[int]] = {}
        self._steps = 0

    def choose(self, batch_size: int) -> int:
        """How many heads draft for the next step of a batch of this size."""
        if not self._adaptive or not self._num_heads:
            return self._num_heads
        known, num_looks = self._of(batch_size)
        untried = [count for count, looks in enumerate(num_looks) if looks < _FIRST_LOOKS]
        if untried:
            return untried[-1]
        self._steps += 1
        best = max(range(self._num_heads + 1), key=lambda count: (self._tokens_a_step(count) / known[count], count))
        trial, step = divmod(self._steps, _STEPS_BETWEEN_TRIALS)
        if trial and step < _STEPS_OF_A_TRIAL:
            return min(best + 1, self._num_heads) if trial % 2 else max(best - 1, 0)
        return best

    def observe(self, batch_size: int, num_drafts: int, seconds: float) -> None:
        """A step that verified so many drafts a sequence, and made as many for the next, took so long."""
        known, num_looks = self._of(batch_size)
        old = known[num_drafts]
        if num_looks[num_drafts] < _FIRST_LOOKS:
            known[num_drafts] = min(old, seconds)
        else:  # a step that somebody else held up tells little, so none counts as more than twice the average
            known[num_drafts] += _SMOOTHING * (min(seconds, 2 * old) - old)
        num_looks[num_drafts] += 1

    def judge(self, num_offered: int, num_accepted: int) -> None:
        """One verification: of `num_offered` drafts the first `num_accepted` were right."""
        for head in range(min(num_accepted + 1, num_offered)):
            self._num_judged[head] += 1
            rate = max(1 / (self._num_judged[head] + 1), _SLOWEST_LEARNING)
            self._acceptance[head] += rate * ((head < num_accepted) - self._acceptance[head])

    def _tokens_a_step(self, count: int) -> float:
        tokens, chance = 1.0, 1.0
        for acceptance in self._acceptance[:count]:
            chance *= acceptance
            tokens += chance
        return tokens

    def _of(self, batch_size: int) -> tuple[list[float], list[int]]:
        """Seconds of a step by number of drafts, and how often each was seen."""
        size, counts = batch_size.bit_length(), self._num_heads + 1
        return self._seconds.setdefault(size, [math.inf] * counts), self._num_looks.setdefault(size, [0] * counts)
