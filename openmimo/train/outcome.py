"""What a finished run leaves, the model and the report, and how to tell that it is there."""

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
    """Whether the run of this config is finished, with nothing left to write; says so on the console.

    Args:
        config: The config of the run, a dataclass with `run_folder`.
        checkpoints: Of the run.
        steps: All steps of the run.
        free: Settings that may differ; see `keep_config`.
        console: For the message.

    Raises:
        ConfigError: Another run is finished there.
    """
    folder = Path(config.run_folder)
    newest = checkpoints.newest()
    if newest is None or checkpoints.newest_step() != steps or not all((folder / name).exists() for name in _FILES):
        return False
    check_same_run(config, folder / "config.json", free=free)
    if not any((folder / "model").glob("*.safetensors")) or find_damage(newest) is not None:
        return False
    console.print(
        f"this run has finished: {steps} steps. Nothing was done; name another run_folder for a new run.",
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
    """Writes the model with its tokenizer, whole or not at all, and the report of a run. Returns the model's folder.

    Raises:
        CheckpointError: The model cannot be written (a full disk, say), or its folder holds something else.
    """
    destination = folder / "model"
    check_replaceable(destination)
    try:
        with new_folder_atomic(destination) as unfinished:
            write_model(model, unfinished, tokenizer=tokenizer)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the model {destination} could not be written: {error}. {checkpoints.standing()} The same command goes on "
            "from there."
        ) from error
    report = write_report(folder)
    console.print(f"model   {destination}\nreport  {report}", soft_wrap=True)
    return destination
