"""A chain of runs in pieces ends with the weights of one that ran at once, and its report has every table."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from end_to_end.test_demo import toy

import openmimo
from openmimo.core.errors import ConfigError, Interrupted
from openmimo.core.metrics import read_metrics
from openmimo.demo import chain
from openmimo.demo.config import ChainConfig
from recipes import small_1gpu


def toy_chain(folder) -> ChainConfig:
    demo = toy(folder)
    return ChainConfig(
        folder=str(folder),
        pretrain=demo.pretrain,
        extend=demo.extend,
        sft=demo.sft,
        teachers=demo.teachers,
        mopd=demo.mopd,
        compare=demo.compare,
        gap_steps=1,
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return dict(openmimo.load_model(str(folder)).named_parameters())


@pytest.mark.slow
def test_pieces_end_with_the_weights_of_a_whole_run(tmp_path, capsys):
    whole = chain.run(toy_chain(tmp_path / "whole"))
    assert whole is not None
    page, out = whole.read_text(), capsys.readouterr().out
    for text in ("Gap of trainer and engine", "without_r3", "Written tokens a second", "student"):
        assert text in page and text in out
    config, minutes, pieces = toy_chain(tmp_path / "pieces"), 0.04, 0
    report = None
    while report is None:
        report = chain.run(replace(config, minutes=minutes))
        minutes, pieces = 1.15 * minutes, pieces + 1
        assert pieces < 60
    assert pieces > 2
    for part in ("pretrain", "extend", "sft", "mopd", "gap_with_r3", "gap_without_r3"):
        one, other = (weights(tmp_path / name / part / "model") for name in ("whole", "pieces"))
        assert all(torch.equal(one[name], other[name]) for name in one), part
    assert chain.run(config) == report, "nothing is left to do"
    gap = read_metrics(tmp_path / "pieces" / "gap_with_r3" / "metrics.jsonl")
    assert any("mismatch_k3" in row for row in gap)
    with pytest.raises(ConfigError, match="chain with other settings"):
        chain.run(replace(config, gap_steps=2))


def test_the_time_ends_the_work_and_an_interrupt_of_the_user_is_passed_on(tmp_path, monkeypatch, capsys):
    config = small_1gpu.chain()
    config = replace(config, folder=str(tmp_path / "chain"), minutes=0.001)
    monkeypatch.setattr(chain, "pretrain", lambda own: time.sleep(20))
    assert chain.run(config) is None
    assert "stopped after 0.001 minutes" in capsys.readouterr().out
    assert chain.run(replace(config, minutes=1e-12)) is None, "over before the first part"
    with pytest.raises(ConfigError, match="minutes"):
        replace(config, minutes=1e300)

    def interrupted(own):
        raise Interrupted(2, "kept")

    monkeypatch.setattr(chain, "pretrain", interrupted)
    with pytest.raises(Interrupted):
        chain.run(replace(config, minutes=0.0))


def test_the_shipped_chain_is_one_of_runs_that_start_from_each_other():
    config = small_1gpu.chain()
    assert config.extend.checkpoint == f"{config.pretrain.run_folder}/model"
    assert config.sft.checkpoint == f"{config.extend.run_folder}/model"
    made = {f"{run.run_folder}/model" for run in config.teachers}
    assert set(config.mopd.teachers.values()) == made | {"self"}
    assert {path for paths in config.compare.models.values() for path in paths} == made | {
        f"{config.mopd.run_folder}/model"
    }
    with_r3, without = chain.gap_runs(config).values()
    assert with_r3.replay_routing and not without.replay_routing and with_r3.run_folder != without.run_folder
    with pytest.raises(ConfigError, match="share a run_folder"):
        replace(config, teachers=(config.teachers[0],) * 2)
    with pytest.raises(ConfigError, match="no teachers"):
        replace(config, teachers=())


def test_speeds_are_tokens_over_seconds(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "samples": 4, "answer_tokens/mean": 50, "seconds/rollout": 3, "seconds/update": 1}\n'
        '{"step": 1, "evaluation/rewards": {}}\n'
        '{"step": 2, "samples": 0, "seconds/rollout": 1, "seconds/update": 0}\n'
    )
    assert chain.speeds(Path(tmp_path)) == {"rollout": 50.0, "update": 200.0, "rollout_share": 0.8}
