"""Run folders: one process at a time, no leftovers, atomic writes, and the messages of a resume."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from forked import start_command
from test_training import ROOT, run_config

from openmimo.core import config as config_io
from openmimo.core import files
from openmimo.core.config import run_folder
from openmimo.core.errors import CheckpointError, ConfigError, UserError
from openmimo.core.files import new_folder_atomic, remove_unfinished, write_text_atomic
from openmimo.core.metrics import MetricsWriter, read_metrics
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import load_model, save_model
from openmimo.train.config import CheckpointConfig, EvaluationConfig
from openmimo.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def short_run(folder: Path, *, steps: int = 2, **changes):
    config = run_config(folder)
    return replace(config, stages=(replace(config.stages[0], steps=steps),), **changes)


def in_process(code: str, *arguments: str) -> subprocess.Popen:
    """Starts Python in another process, which prints a line when it has reached the point that the test needs."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


HOLD = """
import sys, time
from pathlib import Path
from openmimo.core.config import run_folder
with run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
WRITE = """
import sys, time
from pathlib import Path
from openmimo.core.files import new_folder_atomic
with new_folder_atomic(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    with in_process(HOLD, str(tmp_path / "run")) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            before = snapshot(tmp_path / "run")
            with pytest.raises(ConfigError, match=f"another run uses this folder: process {holder.pid} "):
                pretrain(short_run(tmp_path))
            assert snapshot(tmp_path / "run") == before
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    with run_folder(tmp_path / "run"):
        pass


def test_the_unfinished_work_of_a_live_process_stays_and_of_a_dead_one_goes(tmp_path):
    with in_process(WRITE, str(tmp_path / "model")) as writer:
        try:
            unfinished = Path(writer.stdout.readline().strip())
            remove_unfinished(tmp_path)
            assert (unfinished / "half").exists()
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    (tmp_path / ".config.json.123.tmp").write_text("{")
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    """The name refers to a whole folder at every moment, also during the exchange."""
    with new_folder_atomic(tmp_path / "model") as folder:
        (folder / "file").write_text("old")
    replace_entry, seen = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *paths: seen.append(paths) or replace_entry(*paths))
    with new_folder_atomic(tmp_path / "model") as folder:
        (folder / "file").write_text("new")
    assert seen == []
    assert (tmp_path / "model" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_replacement_that_was_killed_half_way_is_finished_at_the_next_use(tmp_path, monkeypatch):
    """On file systems that cannot exchange two folders, the old one is renamed first."""
    model = tiny_model()
    save_model(model, tmp_path / "model")
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    renames, replace_entry = [], os.replace

    def killed(source, destination):
        renames.append(destination)
        if len(renames) == 2:
            raise KeyboardInterrupt
        replace_entry(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(seed=1), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(os, "replace", replace_entry)
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_model(tiny_model(), tmp_path / "model")
        write_text_atomic(tmp_path / "text", "x")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o640


def test_a_finished_run_that_is_started_again_says_so_and_writes_nothing(tmp_path, capsys):
    pretrain(short_run(tmp_path))
    before = snapshot(tmp_path / "run")
    pretrain(short_run(tmp_path))
    assert "this run is finished" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before
    with pytest.raises(ConfigError, match="seed was 0 and is now 1"):
        pretrain(short_run(tmp_path, seed=1))


def test_a_resume_names_what_differs_and_allows_other_housekeeping(tmp_path, monkeypatch):
    """The message has both values; settings without effect on the weights may change."""
    from openmimo.train.trainer import Trainer

    real = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda trainer: real(trainer, stop_after_step=2))
    with contextlib.suppress(UserError):
        pretrain(short_run(tmp_path, steps=4))
    (tmp_path / "run" / "report.html").unlink(missing_ok=True)
    monkeypatch.setattr(Trainer, "run", real)
    config = short_run(tmp_path, steps=4)
    other = replace(config, stages=(replace(config.stages[0], learning_rate=2e-3),))
    with pytest.raises(ConfigError, match=r"stages\.0\.learning_rate was 0\.001 and is now 0\.002"):
        pretrain(other)
    pretrain(
        replace(
            config, checkpoints=CheckpointConfig(every_steps=1, keep_last=1), evaluation=EvaluationConfig(3, 1),
            log_every_steps=2, loader_workers=1,
        )
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


def test_the_tokenizer_of_an_abandoned_start_is_not_taken_for_other_text(tmp_path, monkeypatch):
    from openmimo.train.trainer import Trainer

    def stop(trainer):
        raise CheckpointError("as if killed before the first checkpoint")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", stop)
        with pytest.raises(CheckpointError):
            pretrain(short_run(tmp_path))
    first = Tokenizer.load(tmp_path / "run" / "tokenizer").fingerprint
    with pytest.raises(ConfigError, match=r"tokenizer\.train_megabytes"):
        pretrain(short_run(tmp_path, tokenizer=replace(short_run(tmp_path).tokenizer, train_megabytes=0.2)))
    for file in (tmp_path / "text").iterdir():
        file.write_text(file.read_text().replace("word", "other text "))
    model = pretrain(short_run(tmp_path))
    again = pretrain(short_run(tmp_path, run_folder=str(tmp_path / "fresh")))
    assert Tokenizer.load(model).fingerprint == Tokenizer.load(again).fingerprint != first


def test_a_tokenizer_folder_without_its_file_does_not_stop_a_run(tmp_path):
    """A kill while the tokenizer was first saved leaves such a folder."""
    config = short_run(tmp_path)
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "tokenizer" / ".tokenizer.json.9740.tmp").write_text("{")
    config_io.save(config, tmp_path / "run" / "config.json")
    pretrain(config)
    assert sorted(path.name for path in (tmp_path / "run" / "tokenizer").iterdir()) == [
        "tokenizer.json", "tokenizer_config.json", "trained_on.json",
    ]  # fmt: skip


@pytest.mark.parametrize("missing", [0, 1])
def test_the_data_of_every_stage_is_looked_at_before_anything_is_written(tmp_path, missing):
    config = run_config(tmp_path)
    gone = MixtureConfig((SourceConfig("text_folder", options={"path": str(tmp_path / "gone")}),))
    stages = tuple(
        replace(stage, mixture=gone) if index == missing else stage for index, stage in enumerate(config.stages)
    )
    with pytest.raises(UserError, match="gone"):
        pretrain(replace(config, stages=stages))
    assert not (tmp_path / "run").exists()


def test_rows_that_a_later_stage_cannot_fill_stop_the_run_before_the_first_trains(tmp_path):
    config = run_config(tmp_path)
    long = replace(config.stages[1], sequence_length=100_000, mtp_heads=None)
    with pytest.raises(UserError, match="100000"):
        pretrain(replace(config, stages=(config.stages[0], long)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_metrics_that_are_damaged_are_read_with_a_warning(tmp_path, capsys):
    rows = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(1, 5)]
    for place, damage in ((1, b'{"step": 2, "lo'), (2, b"\xff\xfe{"), (1, b"[]"), (2, b"\0" * 20)):
        lines = list(rows)
        lines[place] = damage
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n\xff\xfe")
        MetricsWriter(tmp_path).truncate_after(9)
        assert f"the first: line {place + 1}" in capsys.readouterr().err
        kept = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
        assert kept == [step for step in range(1, 5) if step != place + 1]


def test_metrics_are_json_for_any_numbers(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": float("nan"), "by_layer": [1.0, float("inf")], "stage": "a"})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "by_layer": [1.0, None],
        "stage": "a",
    }
    assert read_metrics(writer.path)[0]["loss"] != read_metrics(writer.path)[0]["loss"]


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        MetricsWriter(tmp_path).write(1, {"loss": 1.0})


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_ends_a_run_after_a_checkpoint_and_the_run_goes_on(tmp_path, number):
    config = short_run(tmp_path, steps=2000, checkpoints=CheckpointConfig(every_steps=1000))
    config_io.save(config, tmp_path / "start.json")
    process = start_command(["pretrain", "--from", str(tmp_path / "start.json")], tmp_path / "errors")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        metrics.exists() and any(row["step"] > 0 for row in read_metrics(metrics))
    ):
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == 128 + number
    said = (tmp_path / "errors").read_text()
    (newest,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(newest.name.removeprefix("step-"))
    assert f"ended by {number.name}: the checkpoint of step {step} is saved" in said
    assert "Traceback" not in said
    assert max(row["step"] for row in read_metrics(metrics)) == step


def test_the_validation_before_the_first_step_stands_once(tmp_path, monkeypatch):
    from openmimo.train.trainer import Trainer

    def stop(trainer, stage, stage_step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(short_run(tmp_path))
    pretrain(short_run(tmp_path))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation/main" in row].count(0) == 1


def test_a_lock_is_let_go_with_its_file(tmp_path):
    with run_folder(tmp_path / "run"), open(tmp_path / "run" / ".lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "run" / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_cache_that_cannot_be_written_stops_a_run_before_it_trains(tmp_path, monkeypatch):
    """The message names the variable that sets the location of the cache."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="OPENMIMO_CACHE"):
        pretrain(short_run(tmp_path))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_unfinished_token_stores_of_dead_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path / "cache"))
    leftover = tmp_path / "cache" / "tokens" / ".text_folder-0123.abcdef.tmp"
    leftover.mkdir(parents=True)
    pretrain(short_run(tmp_path))
    assert not leftover.exists()
