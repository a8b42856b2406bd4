"""Early termination and partial rollouts favor no answer length."""

import math
from collections import Counter

import numpy as np
import pytest
from scheduler_world import World, make_config, make_scheduler, sample_ids

from openmimo.rl.scheduling import groups

STEPS = 30


def length_bias(world, accepted):
    """Returns the difference between the mean log length of some answers and of all answers, in standard errors."""
    own = [math.log(world.length(sample_id)) for sample_id in accepted]
    every = [math.log(world.length(f"other/{number}")) for number in range(4_000)]
    mean, expected = sum(own) / len(own), sum(every) / len(every)
    variance = sum((value - expected) ** 2 for value in every) / len(every)
    return (mean - expected) / math.sqrt(variance / len(own))


def run(config, *, steps=STEPS, interrupt=True):
    world = World(make_scheduler(config), slots=100, interrupt=interrupt)
    accepted, totals = [], Counter()
    for version in range(steps):
        batch, report = world.step(version)
        accepted += sample_ids(batch)
        totals.update({key: value for key, value in report.items() if key.startswith(("dropped", "staleness"))})
        assert report["short"] == 0
    return world, accepted, totals


@pytest.mark.parametrize("steps", [STEPS, pytest.param(150, marks=pytest.mark.slow)])
def test_early_termination_favors_no_length(steps):
    world, accepted, _ = run(make_config(margin=2.0), steps=steps)
    assert abs(length_bias(world, accepted)) < 3.0


def test_first_come_first_served_would_favor_short_answers(monkeypatch):
    """Shows that the test above can fail: without the rule, the bias in the same simulation is large."""
    monkeypatch.setattr(groups, "holds_up", lambda group, *, version, wait_age: False)
    world, accepted, _ = run(make_config(margin=2.0))
    assert length_bias(world, accepted) < -6.0


@pytest.mark.parametrize("interrupt", [True, False])
@pytest.mark.parametrize("wait_age", [0, 3])
def test_partial_rollouts_favor_no_length_and_lose_none(wait_age, interrupt):
    config = make_config(margin=1.0, unfinished="partial", max_staleness=3, wait_age=wait_age)
    world, accepted, totals = run(config, interrupt=interrupt)
    assert abs(length_bias(world, accepted)) < 3.0
    assert totals["dropped_stale"] == 0
    assert totals["staleness/1"] > 0


def test_a_step_does_not_wait_for_young_groups_if_configured_so():
    times = []
    for wait_age in (0, 3):
        config = make_config(margin=1.0, unfinished="partial", max_staleness=3, wait_age=wait_age)
        times.append(run(config, steps=20)[0].now)
    assert times[1] < 0.8 * times[0]


def test_the_selected_are_the_first_that_started():
    world = World(make_scheduler(make_config(margin=2.0)), slots=200)
    for version in range(20):
        first_new = world.scheduler.state()["num_started"]
        batch, _ = world.step(version)
        for source in ("math", "code"):
            numbers = [int(group[0].group.split("/")[1]) for group in batch if group[0].group.startswith(source)]
            assert numbers == sorted(numbers)
            started = {request.group_id for request in world.requests if request.source == source}
            for number in range(first_new, numbers[-1]):
                group_id = f"{source}/{number}"
                if group_id in started and number not in numbers:
                    rewards = {world.reward(f"{group_id}/{k}", "") for k in range(4 if source == "math" else 2)}
                    assert len(rewards) == 1, "an accepted group was passed over for a later one"


def test_interrupted_answers_go_on_where_they_were():
    config = make_config(margin=2.0, unfinished="partial", max_staleness=5)
    world = World(make_scheduler(config), slots=100)
    mixed = 0
    for version in range(20):
        batch, _ = world.step(version)
        for sample in (sample for group in batch for sample in group):
            assert sample.num_answer_tokens == world.length(sample.info["sample_id"])
            assert (np.diff(sample.versions) >= 0).all()
            mixed += len(set(sample.versions)) > 2
    assert mixed > 5
    assert any(request.partials for request in world.requests)


def test_partials_too_old_are_dropped_and_counted():
    config = make_config(margin=2.0, unfinished="partial", max_staleness=1)
    world = World(make_scheduler(config), slots=100)
    stale = 0
    for step in range(20):
        batch, report = world.step(3 * step)  # versions grow faster than the limit allows
        assert all(min(sample.versions[1:]) == 3 * step for group in batch for sample in group)
        stale += report["dropped_stale"]
    assert stale > 0


def test_the_share_of_partial_samples_is_capped():
    capped = make_config(margin=2.0, unfinished="partial", max_staleness=3, max_partial_fraction=0.25)
    for config, expected in ((capped, False), (make_config(margin=2.0, unfinished="partial"), True)):
        world = World(make_scheduler(config), slots=100)
        shares = [world.step(version)[1]["partial_share"] for version in range(20)]
        assert any(share > 0.25 for share in shares) == expected
        assert any(shares)
