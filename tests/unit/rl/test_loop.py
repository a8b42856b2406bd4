"""Short runs of the post-training loop: files they write, and settings they refuse."""

import io
import itertools
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from rl_runs import (
    batches,
    grpo_config,
    mopd_config,
    run,
    save_models,
    sorting_source,
    source,
    weights,
)

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.metrics import read_metrics
from openmimo.core.samples import Sample, StoredArray
from openmimo.model.hf import load_model
from openmimo.rl import run as run_module
from openmimo.rl.scheduling.event_log import LoggedScheduler
from openmimo.rl.scheduling.problems import Problem
from openmimo.rl.scheduling.scheduler import DataScheduler


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def check_run(config, folder):
    """Checks the files of a finished run, and that each step learned from a full batch of samples of its own."""
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, config.steps + 1))
    evaluations = [row["step"] for row in rows if "evaluation/rewards" in row]
    every = config.evaluation.every_steps
    assert evaluations == sorted({0, *range(every, config.steps + 1, every), config.steps})
    learned = batches(folder)
    assert sorted(learned) == list(range(config.steps))
    ids = [sample[0] for samples in learned.values() for sample in samples]
    assert len(set(ids)) == len(ids)
    for row in steps:
        if config.unfinished == "abort" and config.updates_per_step == 1:
            assert row["staleness_max"] == 0
            assert row["mismatch_k3"] < 1e-8
        assert row["scheduler/short"] == 0
        assert row["samples"] == len(learned[row["step"] - 1])
    assert load_model(folder / "model").logits(torch.arange(20)).isfinite().all()
    return steps


@pytest.fixture(scope="module")
def finished(models):
    """A finished run of GRPO, and its config."""
    config = grpo_config(models, models / "finished", steps=4)
    run(config, report=True)
    return config, models / "finished"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, for tests that change it."""
    config, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    return replace(config, run_folder=str(tmp_path / "run")), tmp_path / "run"


def test_grpo_learns_from_what_pays(models, finished):
    config, folder = finished
    steps = check_run(config, folder)
    assert (folder / "report.html").exists()
    assert all(0.0 < row["reward/mean"] < 1.0 for row in steps)
    assert steps[0]["gradient/norm"] > 0
    start, end = weights(models / "start"), weights(folder / "model")
    assert start.keys() == end.keys()
    moved = {name for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    assert any("mtp" in name for name in moved)
    assert any("e_score_correction_bias" in name for name in moved)
    assert "model.embed_tokens.weight" in moved


def test_a_task_that_is_never_solved_is_no_error(models, tmp_path):
    """All rewards are 0: with dynamic sampling, batches stay empty and the weights do not change."""
    config = grpo_config(models, tmp_path / "run", sources=(sorting_source(),), steps=2, max_draws=1.0)
    folder = run(config)
    assert [len(samples) for samples in batches(tmp_path / "run").values()] == [0, 0]
    start, end = weights(models / "start"), weights(folder)
    assert all(torch.equal(tensor, start[name]) for name, tensor in end.items())
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "samples" in row]
    assert [row["scheduler/dropped_hard"] for row in rows] == [3, 3]


def test_addition_without_dynamic_sampling(models, tmp_path):
    own = replace(sorting_source(), name="add", options={"task": {"name": "addition"}})
    config = grpo_config(models, tmp_path / "run", sources=(own,), steps=2, dynamic_sampling=False)
    run(config)
    steps = check_run(config, tmp_path / "run")
    assert all(row["scheduler/drawn"] == row["samples"] / 4 == 3 for row in steps)  # no group is drawn in vain


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"signal": "top_k", "top_k": 8},
        {"signal": "imitate", "writer": "teacher"},
        {"algorithm_options": {"alpha": 0.5}},
    ],
)
def test_mopd_learns_from_a_teacher_for_each_domain(models, tmp_path, changes):
    config = mopd_config(models, tmp_path / "run", steps=2, **changes)
    run(config)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["scheduler/short"] for row in steps] == [0, 0]
    if "writer" not in changes:
        assert steps[0]["teacher_kl/sort"] == pytest.approx(0.0, abs=1e-6)  # its teacher is the student itself
        assert steps[0]["teacher_kl/letters"] > 1e-3
        assert steps[0]["mismatch_k3"] < 1e-8
    domains = {sample[0].split("/")[0] for samples in batches(tmp_path / "run").values() for sample in samples}
    assert domains == {"letters", "sort"}


def test_unfinished_samples_go_on_in_the_next_step(models, tmp_path):
    config = grpo_config(
        models, tmp_path / "run", steps=4, unfinished="partial", updates_per_step=1, max_running=40,
        sources=(source(), replace(sorting_source(), max_answer_tokens=40)), dynamic_sampling=False,
    )  # fmt: skip
    run(config)
    steps = check_run(config, tmp_path / "run")
    assert max(row["staleness_max"] for row in steps) >= 1
    versions = [set(sample[3]) - {-1} for samples in batches(tmp_path / "run").values() for sample in samples]
    assert any(len(own) > 1 for own in versions)


def test_slow_episodes_of_several_turns(models, tmp_path):
    own = source(environment="rl_runs:SLOW_LETTERS", turns=2)
    config = grpo_config(models, tmp_path / "run", sources=(replace(own, max_answer_tokens=30),), steps=2)
    run(config)
    check_run(config, tmp_path / "run")
    rows = itertools.chain(*batches(tmp_path / "run").values())
    versions = [versions[versions.index(max(versions)) :] for _, _, _, versions, _ in rows]
    assert any(-1 in own for own in versions)  # the environment inserted tokens between two turns


def test_a_finished_run_is_left_as_it_is(copied):
    config, folder = copied
    expected, before = weights(folder / "model"), (folder / "metrics.jsonl").read_text()
    again = weights(run(config))
    assert (folder / "metrics.jsonl").read_text() == before
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


def test_another_config_is_refused_in_the_same_folder(copied):
    config, _ = copied
    with pytest.raises(ConfigError, match="learning_rate was 0.001 and is now 1e-05"):
        run(replace(config, learning_rate=1e-5))
    run(replace(config, reward_threads=2))
    with pytest.raises(ConfigError, match="seed was 0 and is now 1"):
        run(replace(config, seed=1))


def test_another_config_is_refused_before_the_first_checkpoint_too(copied):
    """The event log holds samples that were rolled out under the old config."""
    config, folder = copied
    shutil.rmtree(folder / "checkpoints")
    log = open_log(folder / "events")
    log.begin_step(0)
    log.next_submissions(4)
    log.close()
    with pytest.raises(ConfigError, match="seed was 0 and is now 1"):
        run(replace(config, seed=1))


def test_nothing_of_a_damaged_checkpoints_future_is_repeated(copied):
    """The log begins after the newest checkpoint: a run that falls back to an older one rolls out all samples again."""
    config, folder = copied
    expected = weights(folder / "model")
    newest = folder / "checkpoints" / "step-00000004"
    (newest / "model.safetensors").write_bytes(b"damaged")
    log = open_log(folder / "events")
    log.begin_step(4)
    log.next_submissions(4)
    log.close()
    again = weights(run(config))
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


# The event log


def open_log(path, **options):
    config = replace(grpo_config(path.parent, path.parent).scheduler(), dynamic_sampling=False)
    scheduler = DataScheduler(config, {"letters": lambda index: Problem(f"p{index}", index)})
    return LoggedScheduler(scheduler, path, **options)


def events_of(path, step=0):
    return [event["event"] for event, _ in open_log(path)._read(step)]


def answer(request, index=0):
    return Sample(
        [1, 2], [False, True], [0.0, -0.5], [-1, 0],
        group=request.group_id, reward=float(index % 2), finish_reason="stop",
        info={"sample_id": request.sample_ids[index]},
    )  # fmt: skip


def test_the_log_repeats_what_came_and_hands_out_the_rest(tmp_path):
    path = tmp_path / "events"
    log = open_log(path)
    assert log.begin_step(0) == []
    requests = log.next_submissions(100)
    for index in range(3):
        log.on_sample(answer(requests[0], index))
    state = log.scheduler.state()
    log.close()
    again = open_log(path)
    left = again.begin_step(0)
    assert again.scheduler.state() == state
    ids = [sample_id for request in left for sample_id in request.sample_ids]
    expected = [sample_id for request in requests for sample_id in request.sample_ids]
    assert ids == expected[3:]
    repeated = open_log(path, repeats_exactly=True)
    assert repeated.begin_step(0) == []
    assert repeated.next_submissions(100) == requests
    repeated.close()
    assert events_of(path) == ["submit"]


@pytest.mark.parametrize("ending", ["jsonl", "arrays"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "noise"])
def test_a_record_that_was_cut_short_or_damaged_spoils_nothing(tmp_path, damage, ending):
    path = tmp_path / "events"
    log = open_log(path)
    log.begin_step(0)
    requests = log.next_submissions(100)
    log.on_sample(answer(requests[0], 0))
    log.close()
    file = path / f"step-00000000.{ending}"
    whole = file.read_bytes()
    log.on_sample(answer(requests[0], 1))
    log.close()
    rest = file.read_bytes()[len(whole) :]
    bad = {"cut": rest[:-7], "zeros": bytes(len(rest)), "noise": rest[:-9] + b"?" + rest[-8:]}[damage]
    file.write_bytes(whole + bad)
    assert events_of(path) == ["submit", "sample"]
    again = open_log(path)
    again.begin_step(0)
    again.on_sample(answer(requests[0], 1))
    again.on_sample(answer(requests[0], 2))
    again.close()
    assert file.read_bytes().startswith(whole)
    assert events_of(path) == ["submit"] + ["sample"] * 3
    third = open_log(path)
    third.begin_step(0)
    assert third.scheduler.state() == again.scheduler.state()


def test_a_checkpoint_deletes_files_and_writes_none(tmp_path):
    log = open_log(tmp_path / "events")
    for step in range(3):
        log.begin_step(step)
        (request, *_) = log.next_submissions(12)
        before = {path.name: path.stat().st_ino for path in (tmp_path / "events").iterdir()}
        while not log.scheduler.is_complete():
            for slot in [one for one in log.scheduler.in_flight()]:
                log.on_sample(answer(slot, 0))
        batch, _ = log.take_batch()
        assert events_of(tmp_path / "events", step)[-1] == "batch"
    log.forget_before(2)
    left = {path.name: path.stat().st_ino for path in (tmp_path / "events").iterdir()}
    assert left == {name: before[name] for name in ("step-00000002.jsonl", "step-00000002.arrays")}


def test_another_batch_than_the_recorded_one_is_refused(tmp_path):
    log = open_log(tmp_path / "events")
    log.begin_step(0)
    log.next_submissions(12)
    while not log.scheduler.is_complete():
        for slot in log.scheduler.in_flight():
            log.on_sample(answer(slot, 0))
    log._write({"event": "batch", "samples": ["others"]})
    log.close()
    again = open_log(tmp_path / "events")
    again.begin_step(0)
    with pytest.raises(CheckpointError, match="another batch"):
        again.take_batch()


def test_records_of_the_version_before_are_dropped_with_a_warning(tmp_path, capsys):
    (tmp_path / "step-00000000.events").write_bytes(b"anything")
    log = open_log(tmp_path)
    assert log.begin_step(0) == [] and not list(tmp_path.iterdir())
    assert "format of an earlier version" in capsys.readouterr().err


def test_what_is_on_the_disk_when(tmp_path, monkeypatch):
    """Arrays are synced before records, both before the step learns from them, and the folder after new names."""
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or real(file))
    log = open_log(tmp_path / "events")
    log.begin_step(0)
    log.next_submissions(12)
    while not log.scheduler.is_complete():
        for slot in log.scheduler.in_flight():
            log.on_sample(answer(slot, 0))
    log._synced = time.monotonic() + 1000
    synced.clear()
    log.take_batch()
    step = str(tmp_path / "events" / "step-00000000")
    assert synced == [f"{step}.arrays", f"{step}.jsonl"]
    log._synced = 0.0
    log.begin_step(1)
    log.next_submissions(12)
    assert str(tmp_path / "events") in synced


def test_routes_are_kept_as_bytes(tmp_path):
    """An answer of 1,000 tokens at 47 layers and 8 experts has 376,000 routes."""
    log = open_log(tmp_path / "events")
    log.begin_step(0)
    (request, *_) = log.next_submissions(12)
    long = Sample(
        list(range(1001)), [False] + [True] * 1000, [-0.5] * 1001, [0] * 1001,
        group=request.group_id, reward=1.0, finish_reason="stop", info={"sample_id": request.sample_ids[0]},
        routed_experts=np.arange(1000 * 47 * 8, dtype=np.int64).reshape(1000, 47, 8) % 256,
    )  # fmt: skip
    log.on_sample(long)
    assert isinstance(long.routed_experts, StoredArray)
    log.close()
    sizes = [(tmp_path / "events" / f"step-00000000.{ending}").stat().st_size for ending in ("arrays", "jsonl")]
    assert sizes[0] == 376_000 + 1001 * 17 and sizes[1] < 2000
    again = open_log(tmp_path / "events")
    again.begin_step(0)
    assert again.scheduler.state() == log.scheduler.state()


def test_a_run_prints_once_that_prompts_are_not_shared(models, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "write_report", lambda run_folder: run_folder)
    for mtp_weight, times in ((0.0, 0), (0.1, 1)):
        output = io.StringIO()
        config = grpo_config(models, tmp_path / str(mtp_weight), steps=2, mtp_weight=mtp_weight)
        run_module.train(config, console=Console(file=output))
        assert output.getvalue().count("With mtp_weight 0, the samples of a prompt share it.") == times
