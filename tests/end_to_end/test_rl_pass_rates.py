"""Runs that select problems by pass rate skip hopeless ones, also after a kill."""

import pytest
import torch
from rl_runs import batches, grpo_config, run, run_and_kill, save_models, source, weights

from openmimo.core.metrics import read_metrics
from openmimo.rl.config import SchedulingConfig

HALF_HOPELESS = (source(environment="rl_runs:HALF_HOPELESS"),)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def steps_of(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if "samples" in row]


def test_problems_below_the_limit_are_stepped_over_and_a_kill_changes_nothing(models, tmp_path):
    changes = {"sources": HALF_HOPELESS, "updates_per_step": 1, "max_draws": 10.0}
    limited = changes | {"scheduling": SchedulingConfig(min_pass_rate=0.02, revisit_fraction=0.0)}
    run(grpo_config(models, tmp_path / "all", **changes))
    run(grpo_config(models, tmp_path / "limited", **limited))
    every, chosen = steps_of(tmp_path / "all"), steps_of(tmp_path / "limited")
    assert sum(row["scheduler/dropped_hard"] for row in chosen) < sum(row["scheduler/dropped_hard"] for row in every)
    assert chosen[-1]["scheduler/dropped_hard"] == 0
    assert every[-1]["scheduler/letters/passed_over"] == 0 < chosen[-1]["scheduler/letters/passed_over"]
    assert chosen[-1]["scheduler/letters/known_problems"] == 6
    assert chosen[-1]["scheduler/letters/never_solved_share"] == 0.5

    config = grpo_config(models, tmp_path / "killed", **limited)
    run_and_kill(config, "rollout", 40)
    run(config)
    assert batches(tmp_path / "killed") == batches(tmp_path / "limited")
    whole, again = weights(tmp_path / "limited" / "model"), weights(tmp_path / "killed" / "model")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    names = ("scheduler/letters/passed_over", "scheduler/letters/pass_rate", "scheduler/letters/known_problems")
    assert [[row[name] for name in names] for row in steps_of(tmp_path / "killed")] == [
        [row[name] for name in names] for row in chosen
    ]
