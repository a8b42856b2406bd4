"""Whole post-training runs on a tiny policy: what each step learned from, and kills at chosen points."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rl_world import policy, tokenizer
from safetensors.torch import load_file

from openmimo.core.records import Message
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.model.hf import save_model
from openmimo.rl import run as run_module
from openmimo.rl.agents.environment import Environment, EnvResponse
from openmimo.rl.config import MopdConfig, RlConfig, RlEvaluation, RlSource
from openmimo.rl.loop import RlRun
from openmimo.rl.scheduling.event_log import LoggedScheduler
from openmimo.rl.scheduling.problems import Problem
from openmimo.train.config import CheckpointConfig, OptimizerConfig


@dataclass(frozen=True)
class LettersOptions:
    """Options of an episode with `turns` turns of the policy."""

    turns: int = 1


class LettersEpisode:
    """Rewards lower-case letters, which any policy writes at times. May kill the process (see `kill_here`)."""

    tools, stop = (), ()

    def __init__(self, problem: Problem, options: LettersOptions):
        self.messages = (Message("user", f"write {problem.content}"),)
        self._turns_left, self._text = options.turns - 1, ""

    def respond(self, text: str) -> EnvResponse:
        self._text += text
        self._turns_left -= 1
        return EnvResponse(messages=(Message("user", "more"),)) if self._turns_left >= 0 else EnvResponse()

    def reward(self) -> float:
        kill_here("reward")
        return min(1.0, sum(letter in "aeiounrst" for letter in self._text) / 8)

    def close(self) -> None:
        pass


def letters_problems(options, split, seed):
    def problem_at(index):
        word = random.Random(f"{split} {seed} {index}").choice("abcdef")
        return Problem(f"{split}-{index}", f"{word}{index}")

    return problem_at


LETTERS = Environment("letters", LettersOptions, letters_problems, LettersEpisode)


class HalfHopeless(LettersEpisode):
    """Letters with six problems, every other of which never earns a reward."""

    def __init__(self, problem: Problem, options: LettersOptions):
        super().__init__(problem, options)
        self._is_hopeless = int(problem.id) % 2 == 1

    def reward(self) -> float:
        return 0.0 if self._is_hopeless else super().reward()


def six_problems(options, split, seed):
    return lambda index: Problem(str(index % 6), f"a{index % 6}")


HALF_HOPELESS = Environment("half hopeless", LettersOptions, six_problems, HalfHopeless)
SLOW_LETTERS = replace(LETTERS, is_instant=lambda options: False)


class LateEpisode(LettersEpisode):
    """Letters whose reward takes a moment to compute."""

    def reward(self) -> float:
        time.sleep(0.02)
        return super().reward()


LATE_LETTERS = replace(SLOW_LETTERS, open=LateEpisode)


def source(name="letters", environment="rl_runs:LETTERS", samples_per_prompt=4, **options):
    return RlSource(
        name, samples_per_prompt=samples_per_prompt, max_answer_tokens=10, environment=environment, options=options
    )


def sorting_source():
    return source("sort", "task", task={"name": "sorting", "min_difficulty": 2, "max_difficulty": 4})


SHARED = {
    "steps": 4,
    "groups_per_step": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "bias_rate": 1e-3,
    "max_running": 24,
    "tokens_per_microbatch": 600,
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "engine": EngineConfig(max_sequences=24, prefill_tokens=512, speculative=False, cache_gigabytes=0.02),
    "optimizer": OptimizerConfig(weight_decay=0.0),
    "checkpoints": CheckpointConfig(every_steps=2),
    "evaluation": RlEvaluation(every_steps=3, problems=2),
}


def save_models(folder: Path) -> None:
    """Saves `start`, and `teacher`, whose weights are near it."""
    for name, noise in (("start", 0.0), ("teacher", 0.02)):
        model = policy(0, mtp_heads=1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
        save_model(model, folder / name)
        tokenizer().save(folder / name)


def grpo_config(models: Path, run_folder: Path, **changes) -> RlConfig:
    own = {"sources": (source(),), "updates_per_step": 2} | changes
    return RlConfig(str(models / "start"), str(run_folder), **SHARED | own)


def mopd_config(models: Path, run_folder: Path, **changes) -> MopdConfig:
    own = {
        "sources": (source(samples_per_prompt=2), replace(sorting_source(), samples_per_prompt=1)),
        "teachers": {"letters": str(models / "teacher"), "sort": "self"},
    } | changes
    return MopdConfig(str(models / "start"), str(run_folder), **SHARED | own)


def run(config: RlConfig, *, report: bool = False) -> Path:
    """Runs to the end in this process, and writes what each step learned from to `batches.jsonl`.

    Args:
        report: also draws the figures of the run, which takes longer than the run.
    """
    names = ("token_ids", "logprobs", "versions")
    real, write_report = RlRun._learn, run_module.write_report

    def learn(own, batch):
        reports = real(own, batch)
        samples = [
            (sample.info["sample_id"], *(getattr(sample, name).tolist() for name in names), sample.reward)
            for group in batch
            for sample in group
        ]
        with open(own.run_folder / "batches.jsonl", "a") as file:
            file.write(json.dumps({"step": own.step, "samples": samples}) + "\n")
        return reports

    RlRun._learn = learn
    if not report:
        run_module.write_report = lambda run_folder: run_folder
    try:
        return run_module.train(config, console=Console(quiet=True))
    finally:
        RlRun._learn, run_module.write_report = real, write_report


def batches(run_folder: Path) -> dict[int, list]:
    """Returns what each step learned from; of a repeated step, the last time."""
    rows = [json.loads(line) for line in (run_folder / "batches.jsonl").read_text().splitlines()]
    return {row["step"]: row["samples"] for row in rows}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


_plan: dict[str, int] = {}
_lock = threading.Lock()


def kill_here(where: str) -> None:
    """Kills this process with SIGKILL if this is the call that the plan names."""
    with _lock:
        if where in _plan:
            _plan[where] -= 1
            if _plan[where] < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def run_and_kill(config: RlConfig, where: str, after_calls: int) -> None:
    """Starts a run in another process that SIGKILL ends at a call of `where`.

    Args:
        where: `rollout` (a step of the engine), `reward`, `update` (the optimizer has moved the weights) or `log`
            (a record of the event log is half written).
    """
    process = multiprocessing.get_context("fork").Process(target=_killed_run, args=(config, where, after_calls))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"the run ended with {process.exitcode}"


def _killed_run(config: RlConfig, where: str, after_calls: int) -> None:
    torch.set_num_threads(1)
    _plan[where] = after_calls
    engine_step, optimizer_step, write_line = Engine.step, torch.optim.AdamW.step, LoggedScheduler._write

    def step(own):
        kill_here("rollout")
        return engine_step(own)

    def update(own, *arguments):
        result = optimizer_step(own, *arguments)
        kill_here("update")
        return result

    def write(own, event, sample=None):
        write_line(own, event, sample)
        if _plan.get("log") == 0:
            os.truncate(own._path, own._path.stat().st_size - 20)
        kill_here("log")

    Engine.step, torch.optim.AdamW.step, LoggedScheduler._write = step, update, write
    run(config)
