"""A scheduler that was saved and loaded continues as an uninterrupted one."""

from dataclasses import replace

import pytest
from scheduler_world import World, make_config, make_scheduler, resumed, round_robin, sample_ids

from openmimo.core.errors import CheckpointError

STREAMS = {"math": round_robin("math", 12), "code": round_robin("code", 12)}
WORLD = {"error_rate": 0.1, "reward_delay": 30.0, "pass_rate": lambda problem_id: 1.0 if problem_id[-1] == "1" else 0.6}


@pytest.mark.parametrize(
    ("unfinished", "interrupt"),
    [("abort", True), ("partial", True), pytest.param("partial", False, marks=pytest.mark.slow)],
)
def test_resuming_after_every_call_changes_nothing(unfinished, interrupt):
    config = make_config(unfinished=unfinished, margin=0.5, easy_fraction=0.3, groups_per_step=4)
    plain = World(make_scheduler(config, STREAMS), interrupt=interrupt, **WORLD)
    again = World(make_scheduler(config, STREAMS), interrupt=interrupt, resume_streams=STREAMS, **WORLD)
    for version in range(2):
        assert plain.step(version) == again.step(version)
        assert plain.submitted == again.submitted
    assert plain.num_events == again.num_events > 60
    assert plain.scheduler.state() == again.scheduler.state()
    assert again.scheduler is not plain.scheduler


@pytest.mark.parametrize("crash_after", range(0, 120, 11))
def test_after_a_crash_nothing_is_lost_or_repeated(crash_after):
    config = make_config(unfinished="partial", margin=0.5)
    world = World(make_scheduler(config, STREAMS), **WORLD)
    seen = []
    for version in range(2):
        seen += sample_ids(world.step(version)[0])
    world.begin_step(2)
    for _ in range(crash_after):
        if world.scheduler.is_complete():
            break
        world.submit()
        world.next_event()
    state = world.scheduler.state()
    accepted = {slot["id"] for group in state["groups"] if group["accepted"] for slot in group["slots"]}
    submitted_before = len(world.submitted)

    world.scheduler = resumed(world.scheduler, STREAMS)  # no running sample survives
    world.jobs, world.rewards = {}, {}
    for request in world.scheduler.in_flight():
        world.start(request)
    assert not accepted & set(world.submitted[submitted_before:])
    while not world.scheduler.is_complete():
        world.submit()
        world.next_event()
    seen += sample_ids(world.scheduler.take_batch()[0])
    for version in range(3, 9):
        batch, report = world.step(version)
        seen += sample_ids(batch)
        assert report["short"] == 0
    assert accepted <= set(seen)
    assert len(set(seen)) == len(seen)


def test_the_state_of_another_run_is_refused():
    state = make_scheduler(make_config()).state()
    with pytest.raises(CheckpointError, match="seed"):
        make_scheduler(make_config(seed=1)).load_state(state)
    config = make_config()
    with pytest.raises(CheckpointError, match="source_names"):
        make_scheduler(replace(config, sources=config.sources[:1])).load_state(state)


def test_the_seed_decides():
    worlds = [World(make_scheduler(make_config(seed=seed), STREAMS), pass_rate=0.8) for seed in (0, 0, 1)]
    for version in range(5):
        for world in worlds:
            world.step(version)
    drawn = [[request.problem.id for request in world.requests] for world in worlds]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
