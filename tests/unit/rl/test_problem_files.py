"""A resumed RL run accepts problem files that moved, and refuses files whose content changed."""

import json
from dataclasses import replace

import pytest
import torch
from rl_runs import grpo_config, run, save_models, source
from safetensors.torch import load_file

from openmimo.core.errors import ConfigError, DataError, UserError
from openmimo.core.metrics import read_metrics


def test_changed_problems_are_refused_and_moved_ones_are_not(tmp_path):
    torch.set_num_threads(1)
    save_models(tmp_path)
    rows = [{"prompt": f"write {number}", "answer": "a"} for number in range(40)]

    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"name": "jsonl", "options": {"path": str(path), "scoring": "contains"}}
        return grpo_config(tmp_path, tmp_path / "run", sources=(source("own", "task", task=task),), steps=1)

    first = write(tmp_path / "a.jsonl", rows)
    run(first)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    rows[3]["answer"] = "b"
    with pytest.raises(
        UserError, match=r"source 'own' in .*a.jsonl have changed: .*[0-9a-f]{12}.*now it is [0-9a-f]{12}"
    ):
        run(write(tmp_path / "a.jsonl", rows))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    rows[3]["answer"] = "a"
    run(write(tmp_path / "moved.jsonl", rows))
    broken = write(tmp_path / "b.jsonl", [])
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(DataError, match="b.jsonl, line 1"):
        run(replace(broken, run_folder=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
    (tmp_path / "a.jsonl").write_text((tmp_path / "moved.jsonl").read_text())
    with pytest.raises(ConfigError, match="learning_rate was .* and is now 0.5"):
        run(replace(first, learning_rate=0.5))


def test_a_finished_run_takes_more_steps(tmp_path):
    torch.set_num_threads(1)
    save_models(tmp_path)
    sources = (source("letters", "rl_runs:LETTERS"),)
    for name, lengths in {"grown": (1, 2), "whole": (2,)}.items():
        for steps in lengths:
            run(grpo_config(tmp_path, tmp_path / name, sources=sources, steps=steps))
    grown, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("grown", "whole"))
    assert all(torch.equal(grown[name], whole[name]) for name in whole)
    assert read_metrics(tmp_path / "grown" / "metrics.jsonl")[-1]["step"] == 2
    with pytest.raises(ConfigError, match="steps was 2 and is now 1"):
        run(grpo_config(tmp_path, tmp_path / "grown", sources=sources, steps=1))
