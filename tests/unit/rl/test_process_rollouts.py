"""Rollouts by worker processes give the samples of an engine in this process, lose none and leave no process."""

import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rl_world
import torch
from conftest import randomize
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.metrics import read_metrics
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.model.hf import load_model
from openmimo.rl.config import MopdConfig, RlConfig, RlEvaluation, RlSource
from openmimo.rl.evaluate import episode_opener, streams_of
from openmimo.rl.learning.policy_trainer import score_samples
from openmimo.rl.loop import RlRun
from openmimo.rl.rollouts import weight_buffer
from openmimo.rl.rollouts.backends.processes import ProcessRollouts
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.rollouts.remote import WorkerLostError, WorkerRollouts
from openmimo.rl.rollouts.weight_buffer import TensorSlice, WeightBuffer, WeightLayout, layout_of, model_tensors
from openmimo.rl.rollouts.worker import Failure, WorkerSetup, serve
from openmimo.rl.scheduling.groups import GroupRequest
from openmimo.train.checkpoint import Progress

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc to see which processes are left")

SOURCE = RlSource("addition", options={"task": {"name": "addition"}}, samples_per_prompt=4, max_answer_tokens=24)
ENGINE = EngineConfig(max_sequences=16, speculative=False, cache_gigabytes=0.05)
PATIENCE_SECONDS = 60.0


def request(number, *, samples=2, tokens=24):
    problem = streams_of((SOURCE,), "train", 0)["addition"](number)
    ids = tuple(f"addition/{number}/{place}" for place in range(samples))
    return GroupRequest(f"addition/{number}", "addition", problem, ids, {}, 1.0, tokens, 0)


def poll_until(rollouts, is_enough):
    """Polls until is_enough(all samples so far)."""
    samples, deadline = [], time.monotonic() + PATIENCE_SECONDS
    while not is_enough(samples):
        assert time.monotonic() < deadline, f"only {len(samples)} samples arrived"
        samples += rollouts.poll()
    return samples


def all_of(rollouts):
    return poll_until(rollouts, lambda samples: rollouts.num_running == 0)


def by_id(samples):
    return {sample.info["sample_id"]: sample for sample in samples}


def is_alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(process_ids):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(is_alive(process_id) for process_id in process_ids):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("policy") / "model")


def load_policy(folder):
    return load_model(folder), Tokenizer.load(folder)


def setup_of(policy):
    model, tokenizer = policy
    return WorkerSetup(model.config, tokenizer, ENGINE, functools.partial(episode_opener, (SOURCE,)), seed=5)


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(folder)


@pytest.fixture(scope="module")
def rollouts(policy):
    """Two workers for several tests, which set their own weights. Both processes must have ended after close."""
    opened = ProcessRollouts(policy[0], setup_of(policy), num_workers=2)
    yield opened
    process_ids = opened.process_ids()
    opened.close()
    assert not any(is_alive(process_id) for process_id in process_ids)


NEXT_VERSION = itertools.count(1)


def renew(model, rollouts):
    """Gives model and workers new weights. Returns their version."""
    version = next(NEXT_VERSION)
    randomize(model, version)
    rollouts.update_weights(version)
    return version


def test_samples_are_those_of_an_engine_here_across_two_workers(policy, rollouts):
    model, tokenizer = policy
    here, there = EngineRollouts(Engine(model, tokenizer, ENGINE), episode_opener((SOURCE,)), seed=5), rollouts
    here.update_weights(renew(model, there))
    for number in range(4):
        here.submit(request(number))
        there.submit(request(number))
    expected, found = by_id(all_of(here)), by_id(all_of(there))
    assert set(found) == set(expected)
    for sample_id, sample in found.items():
        other = expected[sample_id]
        same = ("token_ids", "loss_mask", "versions", "reward", "finish_reason", "group", "domain", "info")
        assert all(np.array_equal(getattr(sample, name), getattr(other, name)) for name in same)
        assert sample.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert (sample.routed_experts == other.routed_experts).all()
    assert 0.0 <= there.metrics()["rollout/idle_share"] <= 1.0


@pytest.mark.slow
def test_new_weights_are_used_in_the_middle_of_a_sample(policy, rollouts):
    model, _ = policy
    before = renew(model, rollouts)
    rollouts.submit(request(0, samples=8, tokens=400))
    early = poll_until(rollouts, lambda samples: samples)  # the other samples are still running
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = renew(model, rollouts)
    rollouts.submit(request(2, samples=4))
    rollouts.submit(request(3, samples=4))
    samples = all_of(rollouts)
    news = [sample for sample in samples if sample.group in ("addition/2", "addition/3")]
    assert {version for sample in news for version in sample.versions} == {-1, after}
    for sample, scores in zip(news, score_samples(model, news), strict=True):
        assert sample.logprobs == pytest.approx(scores, abs=1e-4)
    model.load_state_dict(old)
    for sample, scores in zip(news, score_samples(model, news), strict=True):
        assert sample.logprobs != pytest.approx(scores, abs=0.1)
    written = [[version for version in sample.versions if version >= 0] for sample in samples if sample not in news]
    assert len(early) + len(written) == 8
    assert all(versions == sorted(versions) for versions in written)
    assert {before, after} in map(set, written)


@pytest.mark.slow
def test_a_dead_worker_gives_failed_samples_and_another_one_takes_its_place(policy, rollouts):
    model, _ = policy
    rollouts.submit(request(0, tokens=3000))
    version, restarts = renew(model, rollouts), rollouts.num_restarts
    first, second = rollouts.process_ids()
    os.kill(first, signal.SIGKILL)
    failed = poll_until(rollouts, lambda samples: len(samples) == 2)
    assert [sample.finish_reason for sample in failed] == ["error", "error"]
    assert set(by_id(failed)) == {"addition/0/0", "addition/0/1"}
    rollouts.submit(request(0))  # as a scheduler does; the first worker has the fewest samples
    again = all_of(rollouts)
    assert set(by_id(again)) == set(by_id(failed))
    assert {version for sample in again for version in sample.versions} == {-1, version}
    assert rollouts.num_restarts == restarts + 1
    assert rollouts.process_ids()[0] != first
    assert rollouts.process_ids()[1] == second


def test_cancelled_samples_do_not_come_back(rollouts):
    rollouts.submit(request(0, tokens=3000))
    rollouts.submit(request(1))
    rollouts.cancel(["addition/0/0", "addition/0/1", "addition/8/0"])
    assert rollouts.num_running == 2
    assert set(by_id(all_of(rollouts))) == {"addition/1/0", "addition/1/1"}


def broken_opener():
    raise RuntimeError("no such luck")


def wrong_opener():
    raise ConfigError("the setting is wrong")


class RecordingChannel:
    """The channel of a worker that fails at its start: records messages."""

    def __init__(self):
        self.messages = []

    def receive(self, seconds):
        raise AssertionError("a worker that cannot begin takes no orders")

    def send(self, message):
        self.messages.append(message)


@pytest.mark.slow
def test_a_worker_tells_settings_from_other_failures(policy):
    for make_opener, text, is_users in ((wrong_opener, "is wrong", True), (broken_opener, "no such luck", False)):
        channel, layout = RecordingChannel(), layout_of(policy[0])
        serve(replace(setup_of(policy), make_opener=make_opener), layout, WeightBuffer(layout), channel, "cpu")
        (failure,) = channel.messages
        assert text in failure.text
        assert failure.is_users == is_users


class BrokenLink:
    last_words = None

    def send(self, order):
        pass

    def receive(self):
        if self.last_words is not None:
            return [self.last_words]
        raise WorkerLostError("no such luck")

    def end(self, patience_seconds):
        pass


class BrokenRollouts(WorkerRollouts):
    """Rollouts whose workers all die at once."""

    def _start(self, number):
        return BrokenLink()

    def _wait(self, links, seconds):
        return links[-1:]

    def _publish(self, version):
        pass


def test_workers_that_die_again_and_again_are_an_error():
    rollouts = BrokenRollouts(2)
    rollouts.submit(request(0))
    rollouts.submit(request(1))
    assert set(by_id(rollouts.poll())) == {"addition/1/0", "addition/1/1"}
    assert rollouts.num_running == 2
    with pytest.raises(RuntimeError, match="no such luck"):
        for _ in range(5):
            rollouts.poll()
    assert rollouts.num_restarts == 3


def test_a_setting_that_workers_refuse_is_an_error_here(monkeypatch):
    monkeypatch.setattr(BrokenLink, "last_words", Failure("the setting is wrong", is_users=True))
    with pytest.raises(UserError, match="the setting is wrong"):
        BrokenRollouts(1).poll()


TRAINER = """
import sys, time
sys.path[:0] = sys.argv[2:]
if __name__ == "__main__":
    from pathlib import Path
    import test_process_rollouts as own
    folder = Path(sys.argv[1])
    policy = own.load_policy(folder)
    rollouts = own.ProcessRollouts(policy[0], own.setup_of(policy), num_workers=1)
    rollouts.submit(own.request(1))
    own.all_of(rollouts)
    rollouts.submit(own.request(0, tokens=3000))
    print(*rollouts.process_ids(), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed(folder, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), str(here.parents[2])]
    trainer = subprocess.Popen([sys.executable, script, folder, *paths], stdout=subprocess.PIPE, text=True)
    process_ids = [int(word) for word in trainer.stdout.readline().split()]
    assert process_ids
    assert all(is_alive(process_id) for process_id in process_ids)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_until_gone(process_ids)


def _write_often(weights, stop):
    version = 0
    while not stop.is_set():
        version += 1
        weights.write({name: torch.full((5000,), version) for name in "ab"}, version)


@pytest.mark.slow
def test_no_weights_are_half_written():
    layout = WeightLayout(
        (TensorSlice("a", (5000,), torch.int64, 0, 40000), TensorSlice("b", (5000,), torch.int64, 40000, 80000))
    )
    weights, stop = WeightBuffer(layout), threading.Event()
    writer = threading.Thread(target=_write_often, args=(weights, stop))
    weights.write({name: torch.zeros(5000, dtype=torch.int64) for name in "ab"}, 0)
    copies, versions = {}, []

    def take(tensors, version):
        copies.clear()
        copies.update({name: tensor.clone() for name, tensor in tensors.items()}, version=version)
        time.sleep(0.0005 * (len(versions) % 3))  # slow enough that a write overtakes it sometimes

    writer.start()
    try:
        while len(versions) < 100:
            weights.read(take)
            versions.append(copies["version"])
            assert copies["a"].unique().tolist() == copies["b"].unique().tolist() == [versions[-1]]
    finally:
        stop.set()
        writer.join()
    assert versions == sorted(versions)
    assert len(set(versions)) > 1


def config_of(folder, run_folder, **changes):
    return RlConfig(
        checkpoint=str(folder),
        run_folder=str(run_folder),
        sources=(SOURCE,),
        groups_per_step=2,
        dynamic_sampling=False,
        learning_rate=1e-3,
        evaluation=RlEvaluation(every_steps=100, problems=1),
        engine=ENGINE,
        device="cpu",
        dtype="float32",
        **{"steps": 4, "rollouts": "processes", "unfinished": "partial", "max_staleness": 1, **changes},
    )


def open_run(config):
    model, tokenizer = load_policy(Path(config.checkpoint))
    return RlRun(config, model, tokenizer, start=Progress.beginning())


def written(batch):
    return [
        [(sample.info["sample_id"], sample.token_ids.tolist(), sample.versions.tolist()) for sample in group]
        for group in batch
    ]


@pytest.mark.slow
def test_a_run_overlaps_and_goes_on_after_it_was_killed(folder, tmp_path):
    config = config_of(folder, tmp_path / "run")
    batches = {"first": [], "second": []}

    def watch(run, name, stop):
        learn = run._learn

        def watched(batch):
            batches[name].append(written(batch))
            if run.step == stop:
                assert run.rollouts.num_running > 0  # samples of the next step run while this one is learned from
                raise KeyboardInterrupt
            return learn(batch)

        run._learn = watched

    run = open_run(config)
    watch(run, "first", stop=2)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    run = open_run(config)
    watch(run, "second", stop=None)
    run.run()
    assert len(batches["second"]) == 4
    assert batches["second"][:3] == batches["first"]
    names = [sample_id for batch in batches["second"] for group in batch for sample_id, _, _ in group]
    assert len(set(names)) == len(names) == 4 * 2 * 4
    for step, batch in enumerate(batches["second"]):
        ages = {step - version for group in batch for _, _, versions in group for version in versions if version >= 0}
        assert ages <= {0, 1}
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "samples" in row]
    assert all(0.0 <= row["rollout/idle_share"] <= 1.0 and row["rollout/restarts"] == 0 for row in rows)


def test_settings_without_effect_are_errors(folder, tmp_path):
    with pytest.raises(ConfigError, match="rollout_workers has no effect"):
        config_of(folder, tmp_path, rollouts="engine", rollout_workers=2)
    with pytest.raises(ConfigError, match="no effect with writer 'teacher'"):
        MopdConfig("model", "run", (SOURCE,), rollouts="processes", writer="teacher", signal="forward")


def test_a_process_killed_with_the_lock_of_the_weights_holds_up_no_other(monkeypatch):
    monkeypatch.setattr(weight_buffer, "_LOCK_SECONDS", 0.05)
    model = rl_world.policy()
    buffer = WeightBuffer(layout_of(model))
    buffer.write(model_tensors(model), 3)
    buffer._lock.acquire()  # as a process would that is killed while it holds the lock
    assert buffer.version == 3
    buffer._lock.acquire()
    buffer.write(model_tensors(model), 4)
    seen = []
    buffer.read(lambda tensors, version: seen.append(version))
    assert seen == [4]
    assert buffer._lock.acquire(timeout=1)  # the lock works again
