"""The division of micro-batches over processes, and the placement of teachers by bytes."""

from dataclasses import replace

import pytest
import torch
from rl_world import policy

from openmimo.core.errors import ConfigError
from openmimo.core.samples import Sample
from openmimo.model.hf import save_model
from openmimo.rl.config import MopdConfig, RlConfig, RlSource
from openmimo.rl.learning.policy_trainer import PackPlan
from openmimo.rl.ranks import placement
from openmimo.rl.ranks.division import divided, joined
from openmimo.rl.run import train
from openmimo.train.config import ParallelConfig

CPU = torch.device("cpu")
SOURCES = tuple(RlSource(name, samples_per_prompt=1, options={"task": {"name": "addition"}}) for name in "ab")


def pack(domain: str) -> PackPlan:
    return PackPlan([Sample([5, 6, 7], [False, False, True], [0.0] * 3, [-1, -1, 0], domain=domain, weights=[0, 0, 1])])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_pack_is_computed_once_in_rounds_of_one_domain(count):
    packs = [pack(domain) for domain in "aaaab"]
    parts = divided(packs, count, key=lambda sample: sample.domain)
    assert len({len(part) for part in parts}) == 1
    for round_of_packs in zip(*parts, strict=True):
        assert len({own.samples[0].domain for own in round_of_packs}) == 1
    held = [id(own) for part in parts for own in part if not own.is_filler]
    assert sorted(held) == sorted(map(id, packs))
    assert not any(own.samples[0].weights.any() for part in parts for own in part if own.is_filler)
    results = [[id(own) for own in part] for part in parts]
    assert joined(packs, parts, results) == list(map(id, packs))


def test_teachers_are_resident_where_they_fit_then_spread_then_sharded(tmp_path, monkeypatch):
    model = policy(0)
    for name in ("student", "teacher"):
        save_model(model, tmp_path / name)
    one = 4 * sum(parameter.numel() for parameter in model.parameters())
    config = MopdConfig(
        str(tmp_path / "student"), "run", SOURCES, teachers={"a": str(tmp_path / "teacher"), "b": "self"}
    )
    shared = replace(config, teachers={"a": str(tmp_path / "student"), "b": "self"})
    assert list(placement.teacher_bytes(config).values()) == [one, one]
    assert list(placement.teacher_bytes(shared).values()) == [one], "one checkpoint counts once"
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(placement, "free_memory_bytes", lambda device: 8 * one)  # a quarter holds two teachers in all
    chosen = {
        (own.signal, processes): placement.placement_of(own, CPU, processes)
        for own in (config, replace(config, signal="full"))
        for processes in (1, 2, 3)
    }
    assert list(chosen.values()) == ["resident", "spread", "sharded", "resident", "sharded", "sharded"]
    assert placement.placement_of(shared, CPU, 2) == "resident"
    assert placement.placement_of(replace(config, teacher_placement="turns"), CPU, 9) == "turns"


def test_what_needs_several_processes_says_so(tmp_path):
    config = MopdConfig("model", str(tmp_path / "run"), SOURCES, teachers={}, teacher_placement="sharded")
    with pytest.raises(ConfigError, match="torchrun"):
        train(config)
    with pytest.raises(ConfigError, match="engines of a process"):
        replace(config, writer="teacher", signal="forward")
    with pytest.raises(ConfigError, match="logits on all"):
        replace(config, signal="full", teacher_placement="spread")
    alone = RlConfig("model", str(tmp_path / "run"), SOURCES, dynamic_sampling=False)
    with pytest.raises(ConfigError, match="parallel.tp 2"):
        train(replace(alone, parallel=ParallelConfig(tp=2)))
    with pytest.raises(ConfigError, match="parallel.checkpoints whole has no effect"):
        train(replace(alone, parallel=ParallelConfig(checkpoints="whole")))
