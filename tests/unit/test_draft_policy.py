"""Drafts of each sequence: the allocation is the optimum, and the policy learns chances and times from what it sees."""

import itertools
import math
import random

import numpy as np
import pytest

from openmimo.engine.speculative import DraftPolicy, StepCost, StepTimes, allocate

HEADS = 3
COST = StepCost(shared=2e6, experts=4e6, hit_share=0.25, head=2e5)
ALL = [HEADS] * 64

GOOD, FAIR, POOR, BAD = (0.9, 0.85, 0.8), (0.7, 0.6, 0.5), (0.3, 0.2, 0.2), (0.1, 0.1, 0.1)


def cheap_rows(batch, heads, drafts):
    """Seconds of a step that depends on the number of heads more than on the verified rows."""
    return 1.0 + 0.15 * heads + 0.004 * (batch + drafts)


def dear_rows(batch, heads, drafts):
    """Seconds of a step that reads the experts that its rows reach, of 256 with 8 for each row."""
    return 0.5 + 0.05 * heads + 3.0 * (1.0 - (1.0 - 8 / 256) ** (batch + drafts)) + 0.01 * (batch + drafts)


def seconds_of(time, batch):
    return np.array([[time(batch, heads, n) for n in range(batch * HEADS + 1)] for heads in range(HEADS + 1)])


def gains_of(chances):
    return np.cumprod(np.array(chances), axis=1)


def rate(gains_BH, seconds_HN, counts):
    tokens = sum(1.0 + gains[:count].sum() for gains, count in zip(gains_BH, counts, strict=True))
    return tokens / seconds_HN[max(counts), sum(counts)]


@pytest.mark.parametrize("time", [cheap_rows, dear_rows])
@pytest.mark.parametrize("seed", range(6))
def test_the_allocation_is_the_best_of_all(time, seed):
    rng = np.random.default_rng(seed)
    batch = 1 + seed % 4
    gains_BH, seconds_HN = (
        gains_of(rng.uniform(0.05, 1.0, (batch, HEADS)) ** rng.uniform(0.3, 3)),
        seconds_of(time, batch),
    )
    limits = rng.integers(0, HEADS + 1, batch)
    allowed_BH = np.where(np.arange(HEADS) < limits[:, None], gains_BH, 0.0)
    found = allocate(allowed_BH, seconds_HN).tolist()
    possible = itertools.product(*(range(limit + 1) for limit in limits))
    best = max(rate(gains_BH, seconds_HN, counts) for counts in possible)
    assert all(count <= limit for count, limit in zip(found, limits, strict=True))
    assert rate(gains_BH, seconds_HN, found) == pytest.approx(best, rel=1e-12)


def test_equal_gains_keep_the_order_of_the_heads():
    counts = allocate(np.ones((3, HEADS)), seconds_of(cheap_rows, 3))
    assert counts.tolist() == [HEADS] * 3
    assert allocate(np.zeros((3, HEADS)), seconds_of(cheap_rows, 3)).tolist() == [0, 0, 0]


class Simulation:
    """An engine with known chances and times. Sequences of 80 steps come and go, with the chances of `kinds` in turns.

    The policy sees the time of a step with noise, and one step in fifty takes three times as long.
    """

    def __init__(self, kinds, time, batch, *, seed=0):
        self.policy = DraftPolicy(HEADS, adaptive=True, cost=COST)
        self.kinds, self.time, self.batch, self.random = kinds, time, batch, random.Random(seed)
        self.left = [self.random.randint(1, 80) for _ in range(batch)]
        self.owners, self.seats, self.num_sent = list(range(batch)), list(range(batch)), batch
        self.tokens = self.seconds = 0.0
        self.chosen = []

    def run(self, steps):
        """Returns tokens per second of these steps."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(steps):
            self._step()
        return (self.tokens - tokens) / (self.seconds - seconds)

    def _step(self):
        counts = self.policy.choose(self.seats, self.owners, [HEADS] * self.batch)
        accepted = []
        for owner, count in zip(self.owners, counts, strict=True):
            chances, right = self.kinds[owner % len(self.kinds)], 0
            while right < count and self.random.random() < chances[right]:
                right += 1
            accepted.append(right)
        seconds = self.time(self.batch, max(counts), sum(counts))
        noise = self.random.uniform(0.95, 1.05) * (3.0 if self.random.random() < 0.02 else 1.0)
        self.policy.judge(self.seats, self.owners, counts, accepted)
        self.policy.observe(counts, self.batch + sum(accepted), seconds * noise)
        self.tokens += self.batch + sum(accepted)
        self.seconds += seconds
        self.chosen.append(dict(zip(self.owners, counts, strict=True)))
        for row in range(self.batch):
            self.left[row] -= 1
            if not self.left[row]:
                self.left[row], self.owners[row] = 80, self.num_sent + (row - self.num_sent) % len(self.kinds)
                self.num_sent = self.owners[row] + 1

    def best(self, numbers):
        """Tokens per second if each kind always has its number of drafts."""
        counts = [numbers[row % len(self.kinds)] for row in range(self.batch)]
        gains_BH = gains_of([self.kinds[row % len(self.kinds)] for row in range(self.batch)])
        return rate(gains_BH, seconds_of(self.time, self.batch), counts)

    def oracle(self):
        """Tokens per second with the best number of drafts for each kind."""
        return max(map(self.best, itertools.product(range(HEADS + 1), repeat=len(self.kinds))))


@pytest.mark.parametrize(
    ("kinds", "time", "batch", "least"),
    [
        ([GOOD], cheap_rows, 1, 0.95),
        ([GOOD], dear_rows, 16, 0.95),
        ([POOR], cheap_rows, 1, 0.9),
        ([GOOD, FAIR, POOR], cheap_rows, 18, 0.96),
        ([GOOD, FAIR, POOR], dear_rows, 18, 0.96),
    ],
)
def test_it_is_near_the_best_number_for_each_kind(kinds, time, batch, least):
    simulation = Simulation(kinds, time, batch)
    simulation.run(400 // batch + 60)
    assert simulation.run(400) > least * simulation.oracle()


@pytest.mark.parametrize("kinds", [[BAD], [POOR, BAD]])
@pytest.mark.parametrize("batch", [1, 8])
def test_drafts_that_do_not_pay_cost_two_percent_at_most(kinds, batch):
    simulation = Simulation(kinds, dear_rows, batch)
    simulation.run(100)
    found = simulation.run(1500)
    assert found > 0.98 * simulation.best([0] * len(kinds))
    assert any(any(step.values()) for step in simulation.chosen[-1000:])  # it goes on trying


def test_sequences_of_one_batch_differ():
    simulation = Simulation([GOOD, BAD], dear_rows, 12)
    simulation.run(300)
    drafts = [
        [step[owner] for step in simulation.chosen[100:] for owner in step if owner % 2 == kind] for kind in (0, 1)
    ]
    assert np.mean(drafts[0]) > 2.0 and np.mean(drafts[1]) < 0.7


def test_it_follows_chances_that_change():
    simulation = Simulation([BAD], cheap_rows, 4)
    simulation.run(400)
    simulation.kinds = [GOOD]
    simulation.run(1500)
    assert simulation.run(200) > 0.95 * simulation.oracle()
    simulation.kinds = [BAD]
    simulation.run(200)
    assert simulation.run(400) > 0.97 * simulation.best([0])


def test_times_of_other_batches_are_known_apart():
    slow = Simulation([FAIR], lambda batch, heads, drafts: 1.0 + (2.0 if batch > 4 else 0.05) * heads, 2)
    slow.run(200)
    assert max(slow.chosen[-1].values()) == HEADS
    slow.batch, slow.owners, slow.seats, slow.left = 8, list(range(900, 908)), list(range(8)), [10_000] * 8
    slow.run(300)
    assert sum(any(step.values()) for step in slow.chosen[-200:]) < 10


def test_a_seat_that_passes_to_another_sequence_is_forgotten():
    policy = DraftPolicy(HEADS, adaptive=True, cost=COST)
    for _ in range(20):
        policy.judge([0, 5], [1, 2], [3, 3], [3, 0])
    known, other = policy.chances([0, 5], [1, 2]), policy.chances([0, 5], [7, 2])
    assert known[0, 0] > 0.9 > other[0, 0] > other[1, 0]
    assert np.array_equal(known[1], other[1])


def test_a_sequence_that_is_often_right_is_trusted_with_later_heads():
    """The second head has been judged of the first two sequences only."""
    policy = DraftPolicy(HEADS, adaptive=True, cost=COST)
    for step in range(60):
        policy.judge([0, 1, 2, 3], [0, 1, 2, 3], [2, 2, 1, 1], [step % 3, (step + 1) % 3, 1, 0])
    right, wrong, unknown = policy.chances([2, 3, 4], [2, 3, 4])[:, 1]
    assert right > unknown > wrong


def test_first_steps_that_are_slow_do_not_count():
    times = StepTimes(COST, HEADS)
    for seconds in (50.0, 1.1, 1.0):
        times.observe(4, 2, 8, seconds)
    assert times.predict(4, 2, 8) == pytest.approx(1.0)
    assert times.knows(4, 2) and not times.knows(4, 1) and not times.knows(5, 2)


def test_the_slope_of_rows_is_measured():
    """Steps of one shape with 8 to 24 drafts. Their times are those of a line, which the cost of the sizes is not."""
    times, rng = StepTimes(COST, HEADS), random.Random(0)
    for _ in range(400):
        drafts = rng.randint(8, 24)
        times.observe(8, 3, drafts, (1.0 + 0.01 * drafts) * rng.uniform(0.97, 1.03))
    for drafts in (8, 16, 24):
        assert times.predict(8, 3, drafts) == pytest.approx(1.0 + 0.01 * drafts, rel=0.05)
        assert times.seconds(8)[3, drafts] == pytest.approx(times.predict(8, 3, drafts))


def test_rows_share_the_experts_that_they_read():
    """Eight experts of which a row reads two: the expected number of different ones, by all choices of two rows."""
    cost = StepCost(shared=0.0, experts=8.0, hit_share=0.25, head=0.0).main(2)
    pairs = list(itertools.combinations(range(8), 2))
    different = np.mean([len({*a, *b}) for a, b in itertools.product(pairs, pairs)])
    products = 0.1 * 2.0
    assert cost.tolist() == pytest.approx([0.0, 2.0 + products, different + 2 * products])
    assert math.isclose(different, 8 * (1 - 0.75**2))


def test_it_can_be_fixed():
    policy = DraftPolicy(HEADS, adaptive=False, cost=COST)
    policy.judge([0, 1], [0, 1], [3, 3], [0, 0])
    policy.observe([3, 3], 2, 9.0)
    assert policy.choose([0, 1], [0, 1], [3, 1]) == [3, 1]
    assert DraftPolicy(0, adaptive=True, cost=COST).choose([0], [0], [0]) == [0]
