"""Runs of the command line under torchrun: losses of one process, resumption on other meshes, and a killed process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import openmimo
from openmimo.core.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = """
from dataclasses import replace

from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.train.config import CheckpointConfig, EvaluationConfig, Phase, PretrainConfig, TokenizerConfig

REPEATS = SourceConfig("repeats", options={"alphabet": "characters", "min_length": 64, "min_period": 20, "max_period": 31})
TEXT = SourceConfig("python_stdlib", max_megabytes=0.5)


def phase(name, source, length, steps, **settings):
    return Phase(
        name=name, steps=steps, sequence_length=length, global_batch_size=4, learning_rate=3e-3, end_learning_rate=1e-3,
        mixture=MixtureConfig((source,), validation_fraction=0.2), bias_rate=1e-2, **settings,
    )


def pretrain(steps=6):
    return PretrainConfig(
        run_folder="run",
        stages=(phase("copy", REPEATS, 64, 4), phase("text", TEXT, 128, steps, full_rope_theta=1e5, mtp_heads=1)),
        micro_batch_size=1, dtype="float32", device="cpu", threads=1, balance_weight=1e-2, log_every_steps=1,
        tokenizer=TokenizerConfig(train_megabytes=0.2), checkpoints=CheckpointConfig(every_steps=5, keep_last=9),
        evaluation=EvaluationConfig(every_steps=5, batches=1),
    )


def long():
    return pretrain(60)


def odd():
    first, second = pretrain().stages
    warm = replace(second, initial_batch_size=1, batch_warmup_steps=4, batch_multiple=1)
    return replace(pretrain(), stages=(first, warm))


def growing():
    first, second = pretrain().stages
    return replace(pretrain(), stages=(first, replace(second, mtp_heads=2)))
"""  # noqa: E501


def command(folder: Path, processes: int, *arguments: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launch = launcher if processes > 1 else []
    return [sys.executable, *launch, "-m", "openmimo", "pretrain", *arguments, "--run-folder", str(folder)]


def run(folder: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(folder, processes, *arguments), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def losses(folder: Path) -> torch.Tensor:
    rows = read_metrics(folder / "metrics.jsonl")
    return torch.tensor([row.get("loss/main", row.get("validation/main")) for row in rows])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, recipe) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    finished = run(folder, 1, recipe)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.parametrize(
    "mesh",
    [
        ("--parallel.cp", "2", "--parallel.ep", "2", "--parallel.cp-exchange", "heads"),
        ("--parallel.tp", "2", "--parallel.checkpoints", "whole"),
        (),
    ],
)
def test_a_run_has_the_losses_of_one_process(tmp_path, recipe, alone, mesh):
    finished = run(tmp_path / "run", 2, recipe, *mesh)
    assert finished.returncode == 0, finished.stderr
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone), rtol=2e-5, atol=2e-5)
    model, other = (openmimo.load_model(folder / "model") for folder in (tmp_path / "run", alone))
    tokens = torch.arange(64)
    torch.testing.assert_close(model.logits(tokens), other.logits(tokens), rtol=1e-3, atol=1e-3)


def test_a_killed_process_ends_the_run_which_continues_on_another_mesh(tmp_path, recipe):
    folder = tmp_path / "run"
    with open(tmp_path / "output", "w") as output:
        launched = subprocess.Popen(
            command(folder, 2, f"{recipe}:long", "--parallel.cp", "2"), cwd=ROOT, stdout=output, stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            wait_for(folder / "checkpoints" / "step-00000010", launched)
            workers = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(workers[-1]), signal.SIGKILL)
            assert launched.wait(timeout=60) != 0
        finally:
            launched.kill()
    text = (tmp_path / "output").read_text()
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in text
    assert "another process of the run has ended" in text or "SIGTERM" in text
    finished = run(folder, 2, f"{recipe}:long", "--parallel.ep", "2")
    assert finished.returncode == 0, finished.stderr
    assert "continuing from" in finished.stderr
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss/main" in row]
    assert steps == list(range(1, 65))


@pytest.mark.parametrize(
    ("entry", "options", "message"),
    [
        (":odd", (), "an optimizer step has 1 rows"),
        (":growing", (), "mtp_heads rises in the middle of a run"),
        ("", ("--parallel.ep", "3"), "ep is 3"),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused_once_before_a_file_is_written(
    tmp_path, recipe, entry, options, message
):
    refused = run(tmp_path / "run", 2, recipe + entry, *options)
    assert refused.returncode == 1
    assert refused.stderr.count(message) == 1, refused.stderr
    assert not (tmp_path / "run").exists()


FULL_DISK = """
import os, signal, sys
import openmimo.train.sharded
from openmimo.cli import main
from openmimo.train.trainer import Trainer

def write_manifest(*arguments):
    raise OSError(28, "No space left on device")

def train_step(trainer, *arguments):
    report = step(trainer, *arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    return report

openmimo.train.sharded.write_manifest = write_manifest
step, Trainer.train_step = Trainer.train_step, train_step
main()
"""


def test_a_checkpoint_that_fails_at_the_signal_is_not_reported_as_saved(tmp_path, recipe):
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "full_disk.py")]
    ended = subprocess.run(
        [sys.executable, *launch, "pretrain", recipe, "--run-folder", str(tmp_path / "run")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert "step 1 is lost: the checkpoint" in ended.stderr and "No space left on device" in ended.stderr
    assert "is saved" not in ended.stderr


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.2)
