"""Runs of the command line with pipeline stages: losses of one process, a killed process, and other meshes after it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from distributed.test_runs import RECIPE, ROOT, command, losses, run, wait_for

pytestmark = pytest.mark.slow
TWENTY = f"""{RECIPE}

def twenty():
    return dataclasses.replace(pretrain(16), balance_over="batch", z_weight=1e-3, activation_checkpointing=True)
"""
INTERLEAVED = ("--parallel.pp", "2", "--parallel.pp-schedule", "interleaved", "--parallel.pp-boundaries", "1", "2", "4")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text("import dataclasses\n" + TWENTY)
    return f"{path}:twenty"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, recipe) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    finished = run(folder, 1, recipe)
    assert finished.returncode == 0, finished.stderr
    return folder


def test_twenty_steps_on_other_meshes_have_the_losses_of_one_process(tmp_path, recipe, alone):
    """The run starts with stages, is killed, goes on without stages, is killed again, and ends with other stages."""
    folder = tmp_path / "run"
    text = killed(folder, recipe, "step-00000005", *INTERLEAVED)
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in text
    assert "another process of the run has ended" in text or "SIGTERM" in text
    killed(folder, recipe, "step-00000010", "--parallel.cp", "2")
    finished = run(folder, 2, recipe, "--parallel.pp", "2")
    assert finished.returncode == 0, finished.stderr
    assert "continuing from" in finished.stderr
    torch.testing.assert_close(losses(folder), losses(alone), rtol=2e-5, atol=2e-5)


def killed(folder: Path, recipe: str, checkpoint: str, *mesh: str) -> str:
    """Start a run on two processes, kill the second one after a checkpoint, and return what the run printed."""
    output = folder.with_name(f"{checkpoint}.txt")
    with open(output, "w") as file:
        launched = subprocess.Popen(
            command(folder, 2, recipe, *mesh), cwd=ROOT, stdout=file, stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            wait_for(folder / "checkpoints" / checkpoint, launched)
            workers = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(workers[-1]), signal.SIGKILL)
            assert launched.wait(timeout=60) != 0
        finally:
            launched.kill()
    return output.read_text()
