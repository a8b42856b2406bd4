"""Rollouts by Ray actors: the same samples, new weights, and an actor that dies."""

import functools

import numpy as np
import pytest
from conftest import randomize
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.core.errors import ConfigError
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.model.hf import load_model
from openmimo.rl.config import RlSource
from openmimo.rl.evaluate import episode_opener, streams_of
from openmimo.rl.learning.policy_trainer import score_samples
from openmimo.rl.rollouts.backends.ray import RayRollouts
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.rollouts.worker import WorkerSetup
from openmimo.rl.scheduling.groups import GroupRequest

SOURCE = RlSource("addition", options={"task": {"name": "addition"}}, max_answer_tokens=24)
ENGINE = EngineConfig(max_sequences=16, speculative=False, cache_gigabytes=0.05)


def request(number, *, tokens=24):
    problem = streams_of((SOURCE,), "train", 0)["addition"](number)
    ids = tuple(f"addition/{number}/{place}" for place in range(2))
    return GroupRequest(f"addition/{number}", "addition", problem, ids, {}, 1.0, tokens, 0)


def all_of(rollouts):
    samples = []
    while rollouts.num_running:
        samples += rollouts.poll()
    return {sample.info["sample_id"]: sample for sample in samples}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("policy") / "model")
    return load_model(folder), Tokenizer.load(folder)


@pytest.fixture(scope="module")
def setup(policy):
    opener = functools.partial(episode_opener, (SOURCE,))
    return WorkerSetup(policy[0].config, policy[1], ENGINE, opener, seed=5)


def test_without_ray_the_error_says_what_to_install(policy, setup, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"openmimo\[ray\]"):
        RayRollouts(policy[0], setup)


@pytest.mark.slow
def test_actors_roll_out_as_an_engine_here_does_and_are_replaced(policy, setup):
    ray = pytest.importorskip("ray")
    model, tokenizer = policy
    here = EngineRollouts(Engine(model, tokenizer, ENGINE), episode_opener((SOURCE,)), seed=5)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    there = RayRollouts(model, setup, num_workers=2)
    for number in range(4):
        here.submit(request(number))
        there.submit(request(number))
    expected, found = all_of(here), all_of(there)
    same = ("token_ids", "versions", "reward")
    assert set(found) == set(expected)
    for name, sample in found.items():
        assert all(np.array_equal(getattr(sample, own), getattr(expected[name], own)) for own in same)

    randomize(model, 1)
    there.update_weights(1)
    there.submit(request(4))
    news = list(all_of(there).values())
    assert {version for sample in news for version in sample.versions} == {-1, 1}
    for sample, scores in zip(news, score_samples(model, news), strict=True):
        assert sample.logprobs == pytest.approx(scores, abs=1e-4)

    there.submit(request(5, tokens=3000))
    there.submit(request(6, tokens=3000))
    there.cancel(["addition/6/0", "addition/6/1"])
    ray.kill(there._links[0]._actor)
    assert {sample.finish_reason for sample in all_of(there).values()} == {"error"}
    assert there.num_restarts == 1
    for number in (5, 6):
        there.submit(request(number))
    again = all_of(there)
    assert {version for sample in again.values() for version in sample.versions} == {-1, 1}
    assert 0.0 <= there.metrics()["rollout/idle_share"] <= 1.0
    there.close()
    ray.shutdown()
