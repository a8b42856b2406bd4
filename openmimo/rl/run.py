"""`openmimo rl` and `openmimo mopd`: set up or resume a run, train, and write the report."""

import os
from pathlib import Path

from rich.console import Console

from openmimo.core.config import check_same_run
from openmimo.core.errors import ConfigError
from openmimo.core.metrics import read_metrics
from openmimo.core.registry import load_object
from openmimo.core.sample_files import read_state
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import check_replaceable, load_config, load_model
from openmimo.rl.agents.environment import check_same_problems, keep_problem_files, problem_files
from openmimo.rl.algorithm import algorithm_of
from openmimo.rl.config import MopdConfig, RlConfig
from openmimo.rl.evaluate import streams_of
from openmimo.rl.loop import RlRun
from openmimo.rl.report import write_report
from openmimo.runtime.device import activation_dtype
from openmimo.train import outcome
from openmimo.train.checkpoint import Checkpoints, Progress, restore
from openmimo.train.config import check_path
from openmimo.train.outcome import has_finished, held_run, use_device, write_outcome

# Settings without effect on the weights, which may change when a run is resumed.
FREE = (
    *outcome.FREE, "reward_threads", "rollout_workers", "environment_seconds", "max_lost_steps",
    "teacher_placement",
)  # fmt: skip
GROWING = ("steps",)
TRACES = ("checkpoints", "events.jsonl", "events", "metrics.jsonl", "model")


def train(config: RlConfig, *, console: Console | None = None) -> Path:
    """Start or resume a run of RL or, with a MopdConfig, of distillation. Returns the folder of the finished model.

    Raises:
        UserError: Settings, problems or checkpoints do not fit, or the run diverged.
        Interrupted: SIGINT or SIGTERM ended the run after a checkpoint.
    """
    console = console or Console(stderr=True)
    check_path(config.run_folder, "run_folder")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return load_object("openmimo.rl.ranks.run:train")(config, console)
    _refuse_processes(config)
    folder = Path(config.run_folder)
    device = use_device(config)
    checkpoints = Checkpoints(folder, config.checkpoints)
    if has_finished(config, checkpoints, steps=config.steps, free=FREE, console=console):
        return folder / "model"
    tokenizer = check_start(config, folder)
    model = None if checkpoints.newest() else load_model(config.checkpoint, dtype="float32", device=str(device))
    with held_run(config, checkpoints, free=FREE, growing=GROWING, traces=TRACES, console=console) as newest:
        keep_problem_files(problem_files(config.sources), folder)
        if newest is None:
            model = model or load_model(config.checkpoint, dtype="float32", device=str(device))
            start, optimizer_tensors = Progress.beginning(), None
        else:
            model, optimizer_tensors, start = restore(newest, device, read_state=read_state)
        model.compute_dtype = activation_dtype(config.dtype, device)
        run = RlRun(config, model, tokenizer, start=start, optimizer_tensors=optimizer_tensors, console=console)
        run.run()
        written = write_outcome(model, tokenizer, checkpoints, folder, write_report, console)
        console.print(learned_in(config, folder), highlight=False)
        return written


def _refuse_processes(config: RlConfig) -> None:
    """Raise ConfigError if the config needs several processes, because this is one."""
    asked = [f"parallel.{name} {size}" for name, size in config.parallel.sizes.items() if size > 1]
    if config.parallel.checkpoints != "shards":
        raise ConfigError(f"parallel.checkpoints {config.parallel.checkpoints} has no effect here; leave it out.")
    if isinstance(config, MopdConfig) and config.teacher_placement in ("spread", "sharded"):
        asked.append(f"teacher_placement {config.teacher_placement}")
    if asked:
        raise ConfigError(
            f"{', '.join(asked)}: this needs several processes, but this is one; start the command with torchrun "
            "--nproc-per-node N -m openmimo ...."
        )


def check_start(config: RlConfig, folder: Path) -> Tokenizer:
    """Check settings, files and checkpoints before anything is written. Returns the tokenizer of the policy."""
    if (folder / "config.json").exists() and any((folder / name).exists() for name in TRACES):
        check_same_run(config, folder / "config.json", free=FREE, growing=GROWING)
        check_same_problems(problem_files(config.sources), folder)
    check_replaceable(folder / "model")
    algorithm_of(config)
    load_config(config.checkpoint)
    tokenizer = Tokenizer.load(Path(config.checkpoint))
    if isinstance(config, MopdConfig):
        for teacher in set(config.teachers.values()) - {"self"}:
            load_config(teacher)
    streams_of(config.sources, "train", config.seed)
    streams_of(config.sources, "validation", config.seed)
    return tokenizer


def learned_in(config: RlConfig, run_folder: Path) -> str:
    """The numbers of steps and samples that the policy learned from; a warning if there are none."""
    learned = [row["learned_samples"] for row in read_metrics(run_folder / "metrics.jsonl") if "learned_samples" in row]
    text = f"{sum(count > 0 for count in learned)} of {config.steps} steps learned, from {sum(learned)} samples"
    if any(learned):
        return text
    return f"[yellow]warning:[/] {text}: this model is the one that the run started from."
