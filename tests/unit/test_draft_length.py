"""The number of drafts follows the measured step times and acceptance, also after they change."""

import random

import pytest

from openmimo.engine.speculative import DraftLength


def play(length, *, acceptance, seconds, batch_size=1, steps=400, seed=0):
    """Simulates an engine with the given acceptance and step times. Returns the chosen numbers of drafts."""
    rng, choices, drafted = random.Random(seed), [], 0
    for _ in range(steps):
        accepted = 0
        while accepted < drafted and rng.random() < acceptance[accepted]:
            accepted += 1
        length.judge(drafted, accepted)
        chosen = length.choose(batch_size)
        if chosen == drafted:
            length.observe(batch_size, drafted, seconds[drafted] * rng.uniform(0.9, 1.2))
        drafted = chosen
        choices.append(chosen)
    return choices


def usual(choices):
    return max(set(choices), key=choices.count)


@pytest.mark.parametrize(
    "acceptance, seconds, best",
    [
        ([0.9, 0.85, 0.8], [1.0, 1.2, 1.4, 1.6], 3),
        ([0.8, 0.1, 0.1], [1.0, 1.2, 1.4, 1.6], 1),
        ([0.2, 0.1, 0.1], [1.0, 1.4, 1.8, 2.2], 0),
        ([0.9, 0.9, 0.9], [1.0, 2.2, 3.4, 4.6], 0),
    ],
)
def test_it_soon_finds_the_best(acceptance, seconds, best):
    choices = play(DraftLength(3, adaptive=True), acceptance=acceptance, seconds=seconds)
    assert usual(choices[100:]) == best
    assert choices[100:].count(best) > 0.9 * len(choices[100:])


@pytest.mark.parametrize("first", range(4))
def test_a_slow_first_step_of_a_kind_does_not_decide(first):
    seconds = [1.0, 2.2, 3.4, 4.6]
    length = DraftLength(3, adaptive=True)
    length.observe(1, first, 50.0)
    assert usual(play(length, acceptance=[0.9, 0.9, 0.9], seconds=seconds)[30:100]) == 0


def test_batches_of_other_sizes_are_judged_apart():
    length = DraftLength(3, adaptive=True)
    acceptance = [0.7, 0.7, 0.7]
    assert usual(play(length, acceptance=acceptance, seconds=[1.0, 1.1, 1.2, 1.3])[100:]) == 3
    assert usual(play(length, acceptance=acceptance, seconds=[1.0, 2.0, 3.0, 4.0], batch_size=32)[100:]) == 0
    assert usual(play(length, acceptance=acceptance, seconds=[1.0, 1.1, 1.2, 1.3])[50:]) == 3


def test_it_comes_back_when_drafts_begin_to_be_right():
    length, seconds = DraftLength(2, adaptive=True), [1.0, 1.2, 1.4]
    assert usual(play(length, acceptance=[0.05, 0.05], seconds=seconds)[100:]) == 0
    assert usual(play(length, acceptance=[0.95, 0.95], seconds=seconds, steps=20000)[15000:]) == 2


def test_it_can_be_fixed():
    assert set(play(DraftLength(3, adaptive=False), acceptance=[0.0] * 3, seconds=[1.0, 9.0, 9.0, 9.0])) == {3}
    assert DraftLength(0, adaptive=True).choose(4) == 0
