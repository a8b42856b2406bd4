"""Whole runs of post-training on several processes: the metrics of one process, resumption, and a killed process."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from rl_runs import (
    LettersEpisode,
    LettersOptions,
    batches,
    grpo_config,
    letters_problems,
    mopd_config,
    run,
    save_models,
    source,
    weights,
)

from openmimo.core.errors import UserError
from openmimo.core.metrics import read_metrics
from openmimo.rl.agents.environment import Environment
from openmimo.rl.config import RlConfig
from openmimo.rl.loop import RlRun
from openmimo.train.config import CheckpointConfig, ParallelConfig

# Set when tests are collected: a process forked from one that has started threads can wait for them forever.
torch.set_num_threads(1)
UNLIKE = ("seconds/", "rollout/")  # times, and what only workers have


def launch(config: RlConfig, count: int, **options) -> list[multiprocessing.Process]:
    """Starts the processes of a run, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_process, args=(config, rank, count, port), kwargs=options) for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def _process(config: RlConfig, rank: int, count: int, port: int, stop_after: int | None = None) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    real = RlRun.run
    if stop_after is not None:
        RlRun.run = lambda own: (real(own, stop_after_step=stop_after), os._exit(0))
    Path(config.run_folder).parent.mkdir(parents=True, exist_ok=True)
    try:
        run(config)
    except UserError as error:
        Path(f"{config.run_folder}-error-{rank}").write_text(str(error))
        raise SystemExit(2) from error


def finish(processes: list[multiprocessing.Process], seconds: float = 120) -> list[int | None]:
    """Waits for all processes. Returns their exit codes."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run_on(config: RlConfig, count: int, **options) -> None:
    assert finish(launch(config, count, **options)) == [0] * count


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def assert_same_run(folder: Path, expected: Path, *, rel: float = 1e-5) -> None:
    """Two runs learned from the same samples, and have the same metrics."""
    found, other = batches(folder), batches(expected)
    assert found.keys() == other.keys()
    for step, samples in other.items():
        assert [sample[:2] for sample in found[step]] == [sample[:2] for sample in samples], f"tokens of step {step}"
    rows = [read_metrics(path / "metrics.jsonl") for path in (folder, expected)]
    assert len(rows[0]) == len(rows[1])
    for own, row in zip(*rows, strict=True):
        assert own.keys() == row.keys()
        for name, value in row.items():
            if isinstance(value, dict):
                assert own[name] == value, (row["step"], name)
            elif not name.startswith(UNLIKE):
                assert own[name] == pytest.approx(value, rel=rel, abs=1e-5), (row["step"], name)
    for name, weight in weights(expected / "model").items():
        assert (weights(folder / "model")[name] - weight).abs().max() < 2e-3, name


@pytest.fixture(scope="module")
def alone(models) -> Path:
    """A run of one process."""
    run(grpo_config(models, models / "alone"))
    return models / "alone"


@pytest.mark.slow
def test_distillation(tmp_path, models):
    run(mopd_config(models, tmp_path / "alone"))
    run_on(mopd_config(models, tmp_path / "two", teacher_placement="sharded"), 2)
    assert_same_run(tmp_path / "two", tmp_path / "alone")


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_processes(tmp_path, models, alone):
    config = grpo_config(models, tmp_path / "run", checkpoints=CheckpointConfig(every_steps=1))
    for step, count in enumerate((2, 3, 1), start=1):
        leader, *others = finish(launch(config, count, stop_after=step))
        assert leader == 0
        for rank, code in enumerate(others, start=1):
            assert code == 2 and "another process of the run has ended" in error_of(config, rank)
    run_on(config, 2)
    assert_same_run(tmp_path / "run", alone)


def error_of(config: RlConfig, rank: int) -> str:
    return Path(f"{config.run_folder}-error-{rank}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_a_signal_ends_continues(tmp_path, models, alone, end):
    """SIGKILL reaches one process; SIGTERM reaches all, and lets the run save the last whole step."""
    config = grpo_config(models, tmp_path / "run", checkpoints=CheckpointConfig(every_steps=4))
    processes = launch(config, 2)
    wait_for(tmp_path / "run" / "events" / "step-00000002.jsonl")
    for process in processes[1:] if end == signal.SIGKILL else processes:
        os.kill(process.pid, end)
    codes = finish(processes)
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoints/step-*"))
    if end == signal.SIGKILL:
        assert codes == [2, -signal.SIGKILL] and not checkpoints
        assert "another process of the run has ended" in error_of(config, 0)
    else:
        assert codes == [1, 1] and checkpoints in (["step-00000002"], ["step-00000003"])
    run_on(config, 2)
    assert_same_run(tmp_path / "run", alone)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.long
def test_unfinished_samples_of_several_steps(tmp_path, models):
    run(grpo_config(models, tmp_path / "alone", unfinished="partial"))
    run_on(grpo_config(models, tmp_path / "two", unfinished="partial"), 2)
    assert_same_run(tmp_path / "two", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.long
def test_late_rewards(tmp_path, models):
    """Rewards that follow their samples, in no fixed order: each sample is learned from once."""
    own = source("letters", "rl_runs:LATE_LETTERS")
    changes = {"sources": (own,), "unfinished": "partial", "max_draws": 10.0, "updates_per_step": 1}
    config = grpo_config(models, tmp_path / "run", **changes)
    run_on(config, 2)
    steps = batches(tmp_path / "run")
    ids = [sample[0] for samples in steps.values() for sample in samples]
    assert sorted(steps) == list(range(config.steps)) and len(set(ids)) == len(ids) > 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert all(row["logprob_difference_max"] < 1e-4 for row in rows if row["staleness_max"] == 0)


@pytest.mark.slow
@pytest.mark.long
def test_workers_sample_for_a_sharded_trainer(tmp_path, models):
    config = grpo_config(models, tmp_path / "run", rollouts="processes", updates_per_step=1)
    run_on(config, 2)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == config.steps
    # the engine of a worker gave each token the log-probability of the sharded trainer before the step
    assert all(row["logprob_difference_max"] < 1e-4 for row in rows)


def test_what_cannot_be_divided_is_refused_by_name(tmp_path, models):
    config = grpo_config(models, tmp_path / "run", parallel=ParallelConfig(cp=2))
    assert finish(launch(config, 2)) == [2, 1], "the main process prints the error, and the other ends silently"
    assert "parallel.cp is 2" in error_of(config, 0)
    with pytest.raises(UserError, match="torchrun"):
        run(config)


@pytest.mark.slow
def test_an_error_of_any_process_ends_all(tmp_path, models):
    """A reward that is no number from 0 to 1, in the engine of one process."""
    config = grpo_config(models, tmp_path / "run", sources=(source("letters", "distributed.test_policy_runs:SECOND"),))
    assert finish(launch(config, 2)) == [2, 1]
    assert "reward" in error_of(config, 0) and "7.0" in error_of(config, 0)


@pytest.mark.slow
def test_a_run_that_diverges_ends_in_all_processes_and_names_its_checkpoint(tmp_path, models):
    config = grpo_config(models, tmp_path / "run", learning_rate=1e30, warmup_steps=0)
    assert finish(launch(config, 2)) == [2, 1]
    assert "not finite" in error_of(config, 0) and "There is no checkpoint yet" in error_of(config, 0)


class SecondFails(LettersEpisode):
    """Letters, with an impossible reward in the second process."""

    def reward(self) -> float:
        return 7.0 if os.environ["RANK"] == "1" else super().reward()


SECOND = Environment("second fails", LettersOptions, letters_problems, SecondFails)
