"""The results of a finished run: its model and its report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from openmimo.core.errors import CheckpointError
from openmimo.core.files import new_folder_atomic
from openmimo.core.run_folder import check_same_run
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import check_replaceable, write_model
from openmimo.model.mimo import MiMo
from openmimo.train.checkpoint import Checkpoints, find_damage

_FILES = ("config.json", "model/config.json", "model/tokenizer.json", "report.html")


def has_finished(config: Any, checkpoints: Checkpoints, *, steps: int, free: Sequence[str], console: Console) -> bool:
    """Whether the run of this config is finished and complete. Prints a message if it is.

    Args:
        config: The config of the run, a dataclass with `run_folder`.
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
