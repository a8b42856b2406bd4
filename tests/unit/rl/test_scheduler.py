"""The data scheduler in simulated time: properties of every batch in all situations."""

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_world import World, endless, make_config, make_scheduler, round_robin, sample_ids

from openmimo.core.errors import ConfigError
from openmimo.core.samples import Sample
from openmimo.rl.config import SchedulerConfig, SourceQuota
from openmimo.rl.scheduling.scheduler import DataScheduler

DROPS = ("dropped_easy", "dropped_hard", "dropped_equal", "dropped_stale", "dropped_error", "surplus", "aborted")


def check_batch(config, batch, report):
    """Checks the properties of every batch."""
    for group in batch:
        rewards = [sample.reward for sample in group]
        quota = next(source for source in config.sources if group[0].group.startswith(source.name + "/"))
        assert len(group) == quota.samples_per_prompt
        assert len({sample.group for sample in group}) == 1
        assert all(sample.finish_reason == "stop" for sample in group)
        assert not any(map(math.isnan, rewards))
        if config.dynamic_sampling:
            assert len(set(rewards)) > 1
        for sample in group:
            written = [version for version, own in zip(sample.versions, sample.loss_mask, strict=True) if own]
            assert report["version"] - min(written) <= config.max_staleness
    for source in config.sources:
        count = sum(group[0].group.startswith(source.name + "/") for group in batch)
        assert count == report[f"{source.name}/accepted"] <= report[f"{source.name}/quota"]
        assert report[f"{source.name}/short"] == report[f"{source.name}/quota"] - count
        limit = math.ceil(config.max_draws * report[f"{source.name}/quota"])
        drawn = report[f"{source.name}/drawn"]
        assert drawn <= limit
        assert count == report[f"{source.name}/quota"] or drawn == limit
    ended = sum(report[name] for name in DROPS)
    assert report["carried_in"] + report["drawn"] == report["accepted"] + ended + report["in_flight"]
    assert 0.0 <= report["waste_share"] <= 1.0
    if not report["short"]:
        assert report["partial_share"] <= config.max_partial_fraction
    shares = [value for key, value in report.items() if key.startswith("staleness/")]
    assert not shares or sum(shares) == pytest.approx(1.0)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(1, 40),
    pass_rate=st.sampled_from([0.0, 0.05, 0.4, 0.9, 1.0]),
    error_rate=st.sampled_from([0.0, 0.1, 0.6]),
    reward_delay=st.sampled_from([0.0, 50.0]),
    unfinished=st.sampled_from(["abort", "partial"]),
    interrupt=st.booleans(),
    wait_age=st.integers(0, 2),
    margin=st.sampled_from([0.0, 0.1, 1.0]),
    max_partial_fraction=st.sampled_from([0.2, 0.5, 1.0]),
    dynamic_sampling=st.booleans(),
    num_problems=st.sampled_from([3, 50]),
)
def test_batches_fill_or_end_with_a_report(
    seed, slots, pass_rate, error_rate, reward_delay, unfinished, interrupt, wait_age, num_problems, **settings_
):
    carries = unfinished == "partial"
    config = make_config(
        seed=seed, unfinished=unfinished, max_staleness=2, wait_age=wait_age * carries, max_draws=4.0, **settings_
    )
    streams = {name: round_robin(name, num_problems) for name in ("math", "code")}
    world = World(
        make_scheduler(config, streams), slots=slots, seed=seed, pass_rate=pass_rate, error_rate=error_rate,
        reward_delay=reward_delay, interrupt=interrupt,
    )  # fmt: skip
    seen = []
    for version in range(3):
        batch, report = world.step(version)
        check_batch(config, batch, report)
        seen += sample_ids(batch)
        if not carries:
            assert not world.jobs
            assert not world.rewards
    assert len(set(seen)) == len(seen)


def test_full_batches_in_the_ordinary_case():
    world = World(make_scheduler(make_config()))
    for version in range(20):
        batch, report = world.step(version)
        assert len(batch) == 8
        assert report["short"] == 0


def test_quotas_hold_among_accepted_groups_at_any_pass_rates():
    rates = {"a": 0.9, "b": 0.1, "c": 0.5}
    sources = tuple(
        SourceQuota(name, quota=quota, samples_per_prompt=4) for name, quota in (("a", 3), ("b", 2), ("c", 1))
    )
    config = SchedulerConfig(sources, groups_per_step=7, max_draws=50)
    world = World(make_scheduler(config), pass_rate=lambda problem_id: rates[problem_id[0]])
    accepted = Counter()
    for version in range(12):
        batch, _ = world.step(version)
        accepted.update(group[0].group[0] for group in batch)
        for name, share in (("a", 3 / 6), ("b", 2 / 6), ("c", 1 / 6)):
            assert abs(accepted[name] - share * 7 * (version + 1)) < 1.0


def test_submissions_follow_the_expected_acceptance():
    config = SchedulerConfig((SourceQuota("a", samples_per_prompt=2),), groups_per_step=10, margin=0.2)
    scheduler = make_scheduler(replace(config, initial_acceptance=0.25))
    scheduler.begin_step(0)
    assert len(scheduler.next_submissions(1000)) == math.ceil(10 / 0.25 * 1.2)
    assert scheduler.next_submissions(1000) == []
    world = World(make_scheduler(replace(config, source_smoothing=0.1)), pass_rate=0.9)
    reports = [world.step(version)[1] for version in range(30)]
    assert reports[-1]["a/acceptance"] == pytest.approx(2 * 0.9 * 0.1, abs=0.12)


def test_few_slots_get_a_group_in_pieces():
    scheduler = make_scheduler(SchedulerConfig((SourceQuota("a", samples_per_prompt=5),), groups_per_step=2))
    scheduler.begin_step(0)
    assert scheduler.next_submissions(0) == []
    pieces = [request for _ in range(4) for request in scheduler.next_submissions(2)]
    assert [len(request.sample_ids) for request in pieces] == [2, 2, 1, 1, 2]
    assert len({sample_id for request in pieces for sample_id in request.sample_ids}) == 8


def test_priority_decides_who_is_submitted_first():
    sources = (SourceQuota("late", priority=5), SourceQuota("first", priority=-1), SourceQuota("second", priority=0))
    scheduler = make_scheduler(SchedulerConfig(sources, groups_per_step=12))
    scheduler.begin_step(0)
    order = [request.source for request in scheduler.next_submissions(10**6)]
    assert order == sorted(order, key=("first", "second", "late").index)
    assert set(order) == {"first", "second", "late"}


def test_sources_of_one_priority_take_turns():
    scheduler = make_scheduler(SchedulerConfig((SourceQuota("a"), SourceQuota("b")), groups_per_step=4, margin=0))
    scheduler.begin_step(0)
    assert [request.source for request in scheduler.next_submissions(64)] == ["a", "b"] * 4


@pytest.mark.parametrize(("pass_rate", "reason"), [(1.0, "dropped_easy"), (0.0, "dropped_hard")])
@pytest.mark.parametrize("unfinished", ["abort", "partial"])
def test_tasks_without_a_difference_end_at_the_cap(pass_rate, reason, unfinished):
    config = make_config(max_draws=3.0, unfinished=unfinished)
    streams = {name: round_robin(name, 4) for name in ("math", "code")}
    world = World(make_scheduler(config, streams), pass_rate=pass_rate)
    for version in range(5):
        batch, report = world.step(version)
        assert batch == []
        assert report["short"] == 8
        assert report["drawn"] == report[reason] == 24
        assert report["waste_share"] == 0.0


def test_equal_rewards_between_zero_and_one_are_dropped_too():
    world = World(make_scheduler(make_config(max_draws=2.0)))
    world.reward = lambda sample_id, problem_id: 0.5
    batch, report = world.step(0)
    assert batch == []
    assert report["dropped_equal"] == 16


def test_without_dynamic_sampling_every_group_counts():
    world = World(make_scheduler(make_config(dynamic_sampling=False, margin=0.0, initial_acceptance=1.0)), pass_rate=1)
    batch, report = world.step(0)
    assert len(batch) == report["drawn"] == 8


def test_nothing_but_errors_ends_at_the_cap():
    world = World(make_scheduler(make_config(max_draws=2.0, max_sample_retries=1)), error_rate=1.0)
    batch, report = world.step(0)
    assert batch == []
    assert report["dropped_error"] == report["drawn"] == 16
    assert report["errors"] >= 2 * 16
    assert report["waste_share"] == 1.0


def test_errors_are_tried_again_and_never_learned_from():
    config = make_config(max_sample_retries=10)
    world = World(make_scheduler(config), error_rate=0.3)
    batch, report = world.step(0)
    check_batch(config, batch, report)
    assert len(batch) == 8
    assert report["errors"] > 0
    assert report["dropped_error"] == 0


def test_an_infinite_reward_is_refused():
    scheduler = make_scheduler(SchedulerConfig((SourceQuota("a", samples_per_prompt=2),), groups_per_step=1))
    scheduler.begin_step(0)
    (request,) = scheduler.next_submissions(2)
    for reward in (math.inf, -math.inf):
        with pytest.raises(ValueError, match="has the reward"):
            scheduler.on_sample(request.group_id, sample_for(request, reward=reward))


def test_groups_with_too_long_prompts_are_dropped_and_counted():
    sources = (SourceQuota("a", samples_per_prompt=2, max_prompt_tokens=10),)
    scheduler = make_scheduler(SchedulerConfig(sources, groups_per_step=4, max_draws=5), {"a": endless("a")})
    scheduler.begin_step(0)
    while not scheduler.is_complete():
        for request in scheduler.next_submissions(8):
            assert request.max_prompt_tokens == 10
            long = sample_for(request, finish_reason="too_long", reward=math.nan)
            scheduler.on_sample(request.group_id, long)
    batch, report = scheduler.take_batch()
    assert batch == []
    assert report["dropped_too_long"] == report["drawn"] == 20
    assert report["errors"] == report["scored"] == 0


def test_easy_problems_come_at_their_share():
    config = SchedulerConfig((SourceQuota("a", samples_per_prompt=2),), groups_per_step=16, max_draws=100)
    streams = {"a": endless("a")}
    world = World(make_scheduler(config, streams), pass_rate=lambda problem_id: [0.5, 1.0][int(problem_id[2:]) % 2])
    world.step(0)
    counts = Counter()
    for version in range(1, 25):
        counts.update(world.step(version)[1])
    draws, easy = counts["drawn"], counts["drawn_easy"]
    assert draws > 600
    assert abs(easy - 0.1 * draws) < 4 * math.sqrt(0.09 * draws)


def test_solved_problems_leave_the_stream_and_come_back_when_unsolved():
    config = SchedulerConfig(
        (SourceQuota("a", samples_per_prompt=2),), groups_per_step=6, easy_fraction=0.0, max_draws=20
    )
    world = World(make_scheduler(config, {"a": round_robin("a", 6)}))
    world.pass_rate = lambda problem_id: 1.0 if int(problem_id[2:]) < 4 else 0.5
    world.step(0)
    world.step(1)
    num_before = len(world.requests)
    world.step(2)
    assert {request.problem.id for request in world.requests[num_before:]} <= {"a-4", "a-5"}
    assert world.scheduler.report()["a/easy_pool"] >= 4

    config = replace(config, easy_fraction=0.5)
    world = World(make_scheduler(config, {"a": round_robin("a", 6)}), pass_rate=1.0)
    world.step(0)
    assert world.scheduler.report()["a/easy_pool"] == 6
    world.pass_rate = 0.0
    world.step(1)
    assert world.scheduler.report()["a/easy_pool"] == 0


def test_with_no_easy_fraction_solved_problems_stay():
    config = make_config(easy_fraction=None, max_draws=2.0)
    world = World(make_scheduler(config, {name: round_robin(name, 3) for name in ("math", "code")}), pass_rate=1.0)
    world.step(0)
    _, report = world.step(1)
    assert report["drawn_easy"] == report["math/easy_pool"] == 0
    assert {request.problem.id for request in world.requests if request.source == "math"} == {
        "math-0", "math-1", "math-2",
    }  # fmt: skip


def test_memory_of_problems_is_bounded():
    world = World(make_scheduler(make_config(remembered_problems=5)), pass_rate=1.0)
    for version in range(5):
        world.step(version)
    for source in world.scheduler.state()["sources"].values():
        assert len(source["easy"]) <= 5


def sample_for(request, **changes):
    values = {"token_ids": [1, 2], "loss_mask": [False, True], "logprobs": [0.0, -1.0], "versions": [-1, 0]}
    info = {"sample_id": request.sample_ids[0]}
    return Sample(**values | {"finish_reason": "stop", "reward": 1.0, "info": info} | changes)


def test_misuse_is_refused():
    scheduler = make_scheduler(make_config())
    for call in (scheduler.is_complete, scheduler.take_batch, lambda: scheduler.next_submissions(1)):
        with pytest.raises(RuntimeError, match="begin_step"):
            call()
    scheduler.begin_step(3)
    with pytest.raises(RuntimeError, match="open"):
        scheduler.begin_step(4)
    with pytest.raises(RuntimeError, match="not complete"):
        scheduler.take_batch()
    request = scheduler.next_submissions(8)[0]
    with pytest.raises(ValueError, match="no group"):
        scheduler.on_sample("math/999", sample_for(request))
    with pytest.raises(ValueError, match="no sample"):
        scheduler.on_sample(request.group_id, sample_for(request, info={}))
    with pytest.raises(ValueError, match="on_partial"):
        scheduler.on_sample(request.group_id, sample_for(request, finish_reason="abort"))
    scheduler.on_sample(request.group_id, sample_for(request))
    with pytest.raises(ValueError, match="not running"):
        scheduler.on_sample(request.group_id, sample_for(request))


def test_what_comes_too_late_is_counted_and_left():
    world = World(make_scheduler(make_config(margin=3.0)), slots=200)
    world.begin_step(0)
    while not world.scheduler.is_complete():
        world.submit()
        world.next_event()
    world.scheduler.take_batch()
    running = len(world.jobs)
    assert running
    while world.jobs:
        world.next_event()
    assert world.scheduler.report()["late"] == running
    assert set(world.scheduler.take_cancelled()) <= set(world.submitted)


def test_versions_do_not_go_back():
    world = World(make_scheduler(make_config()))
    world.step(5)
    with pytest.raises(ValueError, match="older"):
        world.scheduler.begin_step(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources"),
        ({"sources": (SourceQuota("a"), SourceQuota("a"))}, "sources"),
        ({"sources": (SourceQuota("a", samples_per_prompt=1),)}, "dynamic_sampling"),
        ({"max_draws": 0.5}, "max_draws"),
        ({"unfinished": "partial", "max_staleness": 0}, "max_staleness"),
        ({"wait_age": 1}, "wait_age"),
        ({"unfinished": "partial", "max_staleness": 1, "wait_age": 3}, "wait_age"),
        ({"easy_fraction": 1.5}, "easy_fraction"),
    ],
)
def test_contradictory_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_sources_need_good_values_and_streams():
    with pytest.raises(ConfigError, match="quota"):
        SourceQuota("a", quota=0.0)
    with pytest.raises(ConfigError, match="name"):
        SourceQuota("a/b")
    with pytest.raises(ConfigError, match="streams"):
        DataScheduler(make_config(), {"math": endless("math")})


def test_it_needs_no_torch():
    code = "import sys, openmimo.rl.scheduling.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
