"""`openmimo rl` and `openmimo mopd`: set a run up, find where it stopped, learn, report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openmimo.core import config as config_io
from openmimo.core.errors import ConfigError
from openmimo.core.metrics import read_metrics
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import load_model, save_model
from openmimo.rl.algorithm import algorithm_of
from openmimo.rl.config import RlConfig
from openmimo.rl.evaluate import streams_of
from openmimo.rl.loop import RlRun
from openmimo.rl.report import write_report
from openmimo.runtime.device import fastest_dtype, resolve_device
from openmimo.train.checkpoint import Checkpoints, Progress, restore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(config: RlConfig, *, console: Console | None = None) -> Path:
    """Runs or resumes a run of RL or, with a MopdConfig, of distillation. Returns the folder of the finished model."""
    console = console or Console(stderr=True)
    run_folder = Path(config.run_folder)
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    algorithm_of(config)
    tokenizer = Tokenizer.load(Path(config.checkpoint))
    streams_of(config.sources, "train", config.seed)
    streams_of(config.sources, "validation", config.seed)
    _keep_config(config, run_folder)
    newest = Checkpoints(run_folder, config.checkpoints).newest_intact()
    if newest is None:
        model = load_model(config.checkpoint, dtype="float32", device=str(device))
        start, optimiser_tensors = Progress.beginning(), None
    else:
        console.print(f"going on from {newest}")
        model, optimiser_tensors, start = restore(newest, device)
    model.compute_dtype = fastest_dtype(device) if config.dtype == "auto" else DTYPES[config.dtype]
    run = RlRun(config, model, tokenizer, start=start, optimiser_tensors=optimiser_tensors, console=console)
    run.run()
    model_folder = run_folder / "model"
    save_model(model, model_folder)
    tokenizer.save(model_folder)
    report = write_report(run_folder)
    console.print(f"model   {model_folder}\nreport  {report}\n{learned_in(config, run_folder)}", highlight=False)
    return model_folder


def learned_in(config: RlConfig, run_folder: Path) -> str:
    """How many steps learned from how many samples; a warning where none did."""
    learned = [row["learned_samples"] for row in read_metrics(run_folder / "metrics.jsonl") if "learned_samples" in row]
    text = f"{sum(count > 0 for count in learned)} of {config.steps} steps learned, from {sum(learned)} samples"
    if any(learned):
        return text
    return f"[yellow]warning:[/] {text}: this model is the one that the run started from."


def _keep_config(config: RlConfig, run_folder: Path) -> None:
    """Saves the config in the run folder; refuses to go on with a run that was started with another one."""
    path = run_folder / "config.json"
    has_begun = any((run_folder / name).exists() for name in ("checkpoints", "events"))
    if path.exists() and has_begun:
        before = _decisive(config_io.load(type(config), path))
        now = _decisive(config)
        changed = [name for name in now if now[name] != before[name]]
        if changed:
            raise ConfigError(
                f"{run_folder} holds a run with another {', '.join(changed)}. Name another run_folder for a new run, "
                f"or repeat the old one with --from {path}."
            )
    run_folder.mkdir(parents=True, exist_ok=True)
    config_io.save(config, path)


def _decisive(config: RlConfig) -> dict[str, Any]:
    """The settings that may not differ between two starts of one run."""
    return config_io.to_dict(
        replace(
            config, run_folder="", device="auto", threads=0, tensorboard=False, reward_threads=1, rollout_workers=1,
            environment_seconds=1.0, max_lost_steps=0, activation_checkpointing=False,
        )
    )  # fmt: skip
