"""A post-training run that is killed or ended at any point and resumed equals the uninterrupted run bit for bit."""

import os
import signal

import pytest
import torch
from rl_runs import batches, grpo_config, mopd_config, run, run_and_kill, save_models, source, weights

from openmimo.core.errors import Interrupted
from openmimo.core.metrics import read_metrics
from openmimo.engine.engine import Engine

CONFIGS = {"grpo": grpo_config, "mopd": mopd_config}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(models):
    """One uninterrupted run for each algorithm."""
    folders = {name: models / f"whole-{name}" for name in CONFIGS}
    for name, folder in folders.items():
        run(CONFIGS[name](models, folder))
    return folders


@pytest.mark.parametrize(
    ("name", "where", "after_calls"),
    [
        ("grpo", "reward", 44),
        pytest.param("grpo", "update", 7, marks=pytest.mark.slow),  # in the second half of a batch
        ("mopd", "rollout", 30),  # before the first checkpoint
        pytest.param("grpo", "rollout", 58, marks=pytest.mark.slow),
        pytest.param("mopd", "reward", 14, marks=pytest.mark.slow),
        pytest.param("mopd", "update", 3, marks=pytest.mark.slow),
        pytest.param("grpo", "rollout", 30, marks=pytest.mark.slow),
        pytest.param("grpo", "update", 0, marks=pytest.mark.slow),
        pytest.param("grpo", "log", 20, marks=pytest.mark.slow),
        pytest.param("mopd", "rollout", 58, marks=pytest.mark.slow),
        pytest.param("mopd", "update", 0, marks=pytest.mark.slow),
        pytest.param("mopd", "log", 20, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(models, uninterrupted, tmp_path, name, where, after_calls):
    config = CONFIGS[name](models, tmp_path / "run")
    run_and_kill(config, where, after_calls)
    assert not (tmp_path / "run" / "model").exists()
    run(config)
    expected, resumed = batches(uninterrupted[name]), batches(tmp_path / "run")
    assert sorted(resumed) == list(range(config.steps))
    for step, samples in expected.items():
        assert resumed[step] == samples
    ids = [sample[0] for samples in resumed.values() for sample in samples]
    assert len(set(ids)) == len(ids)
    whole, again = weights(uninterrupted[name] / "model"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
    for key in ("loss", "reward/mean", "gradient/norm", "evaluation/letters"):
        rows = [read_metrics(folder / "metrics.jsonl") for folder in (uninterrupted[name], tmp_path / "run")]
        assert [row[key] for row in rows[0] if key in row] == [row[key] for row in rows[1] if key in row]


def test_a_signal_in_a_rollout_saves_the_last_whole_step_and_the_run_goes_on(
    models, uninterrupted, tmp_path, monkeypatch
):
    config = grpo_config(models, tmp_path / "run")
    real, calls = Engine.step, []

    def step(engine):
        calls.append(engine)
        if len(calls) == 58:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        with pytest.raises(Interrupted) as caught:
            run(config)
    assert caught.value.signal == signal.SIGTERM
    done = max(row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert f"the checkpoint of step {done} is saved" in caught.value.kept
    run(config)
    expected, resumed = weights(uninterrupted["grpo"] / "model"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rollout", "reward"])
@pytest.mark.parametrize(
    "changes",
    [
        {"sources": (source(environment="rl_runs:SLOW_LETTERS", turns=2),)},
        {"unfinished": "partial", "updates_per_step": 1},
    ],
)
def test_what_was_accepted_is_learned_from_once_where_bits_may_differ(models, tmp_path, where, changes):
    """Slow episodes return in any order, and partial samples begin again; none is lost or counted twice."""
    config = grpo_config(models, tmp_path / "run", **changes)
    run_and_kill(config, where, 25)
    run(config)
    learned = batches(tmp_path / "run")
    assert sorted(learned) == list(range(config.steps))
    ids = [sample[0] for samples in learned.values() for sample in samples]
    assert len(set(ids)) == len(ids)
    assert all(len(samples) == 12 for samples in learned.values())
