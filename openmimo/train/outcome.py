"""The start of a run in its folder, and the results of a finished run: its model and its report."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from openmimo.core.errors import CheckpointError
from openmimo.core.files import new_folder_atomic
from openmimo.core.run_folder import check_same_run, keep_config, run_folder
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import check_replaceable, write_model
from openmimo.model.mimo import MiMo
from openmimo.runtime.device import resolve_device
from openmimo.train.checkpoint import Checkpoints, find_damage
from openmimo.train.config import RunConfig

# Settings of every run that do not affect the weights: they may change when a run continues.
FREE = (
    "run_folder", "device", "threads", "tensorboard", "checkpoints.*", "evaluation.*", "optimizer.max_skipped_steps",
    "*.options.path", "*.options.test_path",
)  # fmt: skip
_FILES = ("config.json", "model/config.json", "model/tokenizer.json", "report.html")


def use_device(config: RunConfig) -> torch.device:
    """The device of a run. Also sets the number of CPU threads."""
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    return device


@contextlib.contextmanager
def held_run(
    config: RunConfig, checkpoints: Checkpoints, *, free: Sequence[str], traces: Sequence[str], console: Console
) -> Iterator[Path | None]:
    """Holds the folder of a run, and saves its config there. Yields its newest intact checkpoint (None: a new run).

    Args:
        config: The config of the run.
        checkpoints: The checkpoints of the run.
        free: Settings that may differ; see `keep_config`.
        traces: Files that exist as soon as the run has begun; see `keep_config`.
        console: Where the checkpoint is named.
    """
    folder = Path(config.run_folder)
    with run_folder(folder):
        keep_config(config, folder, free=free, traces=traces)
        checkpoints.recover()
        newest = checkpoints.newest_intact()
        if newest is not None:
            console.print(f"going on from {newest}", soft_wrap=True)
        yield newest


def has_finished(
    config: RunConfig, checkpoints: Checkpoints, *, steps: int, free: Sequence[str], console: Console
) -> bool:
    """Whether the run of this config is finished and complete. Prints a message if it is.

    Args:
        config: The config of the run.
        checkpoints: The checkpoints of the run.
        steps: Total steps of the run.
        free: Settings that may differ; see `keep_config`.
        console: Where the message is printed.

    Raises:
        ConfigError: The folder contains another finished run.
    """
    folder = Path(config.run_folder)
    newest = checkpoints.newest()
    if newest is None or checkpoints.newest_step() != steps or not all((folder / name).exists() for name in _FILES):
        return False
    check_same_run(config, folder / "config.json", free=free)
    if not any((folder / "model").glob("*.safetensors")) or find_damage(newest) is not None:
        return False
    console.print(
        f"this run is finished: {steps} steps. Nothing was done; set another run_folder for a new run.",
        soft_wrap=True,
    )
    console.print(f"model   {folder / 'model'}\nreport  {folder / 'report.html'}", soft_wrap=True)
    return True


def write_outcome(
    model: MiMo,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    folder: Path,
    write_report: Callable[[Path], Path],
    console: Console,
) -> Path:
    """Writes the model with its tokenizer (atomically) and the report of a run. Returns the folder of the model.

    Raises:
        CheckpointError: The model cannot be written (e.g. the disk is full), or its folder contains other files.
    """
    destination = folder / "model"
    check_replaceable(destination)
    try:
        with new_folder_atomic(destination) as unfinished:
            write_model(model, unfinished, tokenizer=tokenizer)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the model {destination} could not be written: {error}. {checkpoints.standing()} The same command "
            "continues from there."
        ) from error
    report = write_report(folder)
    console.print(f"model   {destination}\nreport  {report}", soft_wrap=True)
    return destination
