"""Post-training runs that diverge, are started twice, or have wrong settings."""

import multiprocessing

import pytest
import torch
from rl_runs import grpo_config, mopd_config, run, save_models

from openmimo.core.config import run_folder
from openmimo.core.errors import ConfigError, DivergedError
from openmimo.rl.learning.policy_trainer import PolicyTrainer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.mark.parametrize("make_config", [grpo_config, mopd_config])
def test_a_bad_step_ends_the_run_and_good_checkpoints_stay(models, tmp_path, monkeypatch, make_config):
    real = PolicyTrainer._tokens

    def tokens(trainer, pack, hidden, version, old):
        forward = real(trainer, pack, hidden, version, old)
        if version == 3:
            forward.states_ND.register_hook(lambda gradient: gradient * float("nan"))
        return forward

    monkeypatch.setattr(PolicyTrainer, "_tokens", tokens)
    with pytest.raises(DivergedError) as caught:
        run(make_config(models, tmp_path / "run"))
    assert "step 4" in str(caught.value)
    assert "step-00000002, is intact" in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_finished_run_is_not_run_again_and_a_running_one_not_twice(models, tmp_path):
    config = grpo_config(models, tmp_path / "run", steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("in place of figures, which take longer to draw than the run")
    run(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    run(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    process = multiprocessing.get_context("fork").Process(target=_second_run, args=(models, tmp_path / "other"))
    with run_folder(tmp_path / "other"):
        process.start()
        process.join(120)
    assert process.exitcode == 0


def _second_run(models, folder) -> None:
    with pytest.raises(ConfigError, match="another run uses this folder"):
        run(grpo_config(models, folder))


@pytest.mark.parametrize(
    "changes",
    [{"algorithm": "nope"}, {"checkpoint": "/nowhere"}, {"teachers": {"letters": "/nowhere", "sort": "self"}}],
)
def test_nothing_is_written_before_the_checks(models, tmp_path, changes):
    from dataclasses import replace

    from openmimo.core.errors import UserError

    make_config = mopd_config if "teachers" in changes else grpo_config
    with pytest.raises(UserError, match="nope|nowhere"):
        run(replace(make_config(models, tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
