"""Checkpoints of a run: model, optimizer, positions in schedule and data, random generators.

A checkpoint is a model folder in the Hugging Face layout, so that it can be loaded, served and converted, with an
additional folder `trainer/`. It is written atomically. A manifest has the checksum of each file, so that a damaged
checkpoint is detected and the previous one used.

A run on several devices writes weights and optimizer in shards to `trainer/shards/` instead (`train/sharded.py`).
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from openmimo.core import config as config_io
from openmimo.core.errors import CheckpointError, DivergedError
from openmimo.core.files import new_folder_atomic, recover_folder, remove_unfinished
from openmimo.core.registry import load_object
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import Model, load_model, write_model
from openmimo.model.hf_files import umask_mode
from openmimo.model.mimo import MiMo
from openmimo.runtime.device import rng_state, set_rng_state
from openmimo.train.config import CheckpointConfig

SHARDS = "shards"
_MANIFEST = "manifest.json"
_ARRAYS = "samples.arrays"
_OPTIMIZER = "optimizer.safetensors"
_OPTIMIZER_BEFORE = "optimiser.safetensors"  # its name in the previous version
_REQUIRED = {"config.json", "trainer/progress.json"}
_REQUIRED_WHOLE = _REQUIRED | {f"trainer/{_OPTIMIZER}"}
_REQUIRED_SHARDS = _REQUIRED | {f"trainer/{SHARDS}/.metadata"}
StateWriter = Callable[[Any, Path], Any]
StateReader = Callable[[Any, Path], Any]


def _as_it_is(state: Any, path: Path) -> Any:
    """Return a state that is plain JSON already."""
    return state


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        step: Completed optimizer steps, including skipped ones.
        tokens: Tokens read in these steps.
        stage_index: Stage of the last step.
        loader: State of the loader of that stage, as plain JSON or in a form that `write_state` converts.
        skipped: Steps that the guard skipped.
        skipped_in_a_row: Consecutive skipped steps at the end.
    """

    step: int
    tokens: int
    stage_index: int
    loader: dict[str, Any]
    skipped: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def beginning(cls) -> "Progress":
        """Return the progress of a run that has not started."""
        return cls(step=0, tokens=0, stage_index=0, loader={})


class Checkpoints:
    """The checkpoints of one run folder, in `checkpoints/step-00000200`.

    Args:
        run_folder: The folder of the run.
        policy: The retention policy.
        write_state: Converts the progress, including the loader's state, to plain JSON. It may write arrays to the
            given path. The default is for states that are plain JSON already.
    """

    def __init__(self, run_folder: Path, policy: CheckpointConfig, *, write_state: StateWriter = _as_it_is):
        self.folder = run_folder / "checkpoints"
        self.policy = policy
        self._write_state = write_state

    def save(
        self, model: MiMo, optimizer_tensors: dict[str, torch.Tensor], tokenizer: Tokenizer, progress: Progress
    ) -> Path:
        """Write a checkpoint, then delete those that the policy does not keep.

        Args:
            model: The model.
            optimizer_tensors: A result of `optimizer_state`.
            tokenizer: The tokenizer of the model.
            progress: The progress of the run.

        Raises:
            CheckpointError: It cannot be written (e.g. the disk is full). Earlier checkpoints are unchanged.
        """
        return self.write(
            progress.step,
            lambda folder: self._write(folder, model, optimizer_tensors, tokenizer, progress),
        )

    def write(self, step: int, write_files: Callable[[Path], None]) -> Path:
        """Write a checkpoint of any kind of model, then delete those that the policy does not keep.

        Args:
            step: Completed optimizer steps.
            write_files: Writes `config.json`, weights, `trainer/progress.json` and `trainer/optimizer.safetensors` to a
                folder. The manifest is added here.

        Raises:
            CheckpointError: It cannot be written. Earlier checkpoints are unchanged.
        """
        path = self.path_of(step)
        try:
            with new_folder_atomic(path) as folder:
                write_files(folder)
                write_manifest(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the checkpoint {path} could not be written: {error}. {self.standing()}") from error
        self.delete_old()
        return path

    def newest_intact(self) -> Path | None:
        """Return the newest checkpoint whose files match their checksums; None if there is no checkpoint.

        Prints a warning for each damaged checkpoint that is skipped.

        Raises:
            CheckpointError: Every checkpoint is damaged.
        """
        for path in reversed(self._all()):
            damage = find_damage(path)
            if damage is None:
                return path
            print(f"warning: {damage} This checkpoint is skipped, and the previous one used.", file=sys.stderr)
        if self._all():
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; move the folder away to start from the beginning."
            )
        return None

    def recover(self) -> None:
        """Remove or restore what a process that was killed during a write has left. Only the owner of the run may."""
        for path in self.folder.glob(".step-*old"):
            recover_folder(self.folder / path.name.split(".")[1])
        remove_unfinished(self.folder)

    def newest(self) -> Path | None:
        """Return the newest checkpoint, intact or not; None if there is none."""
        step = self.newest_step()
        return None if step is None else self.path_of(step)

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, intact or not; None if there is none."""
        return next((int(path.name.removeprefix("step-")) for path in reversed(self._all())), None)

    def standing(self) -> str:
        """Return a sentence that names the newest intact checkpoint."""
        intact = next((path for path in reversed(self._all()) if find_damage(path) is None), None)
        return "There is no checkpoint yet." if intact is None else f"The newest checkpoint, {intact}, is intact."

    def save_before_end(self, step: int, save: Callable[[], Path]) -> str:
        """Save a run that a signal ends after `step`, unless a checkpoint of `step` exists. Returns what was saved."""
        advice = "The same command continues from there."
        try:
            if step == 0:
                return "no step was completed, so only the initial files of the run exist."
            if step != self.newest_step():
                save()
            return f"the checkpoint of step {step} is saved. {advice}"
        except (CheckpointError, DivergedError) as error:
            return f"step {step} is lost: {error} {self.standing()}"

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Add the sentence of `standing` to a DivergedError of the block."""
        try:
            yield
        except DivergedError as error:
            raise DivergedError(f"{error} {self.standing()}") from error

    def path_of(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))

    def _write(
        self,
        folder: Path,
        model: MiMo,
        optimizer_tensors: dict[str, torch.Tensor],
        tokenizer: Tokenizer,
        progress: Progress,
    ) -> None:
        write_model(model, folder, tokenizer=tokenizer)
        trainer = folder / "trainer"
        trainer.mkdir()
        write_tensors(trainer / _OPTIMIZER, {**optimizer_tensors, **generators(model.device)})
        self.write_progress(trainer, progress)

    def write_progress(self, folder: Path, progress: Progress) -> None:
        """Write `progress.json`, and the arrays of the loader's state, to the folder `trainer` of a checkpoint."""
        (folder / "progress.json").write_text(json.dumps(self._write_state(vars(progress), folder / _ARRAYS)))

    def delete_old(self) -> None:
        """Delete the checkpoints that the policy does not keep."""
        every = self.policy.keep_every
        for path in self._all()[: -max(self.policy.keep_last, 1)]:
            if not (every and int(path.name.removeprefix("step-")) % every == 0):
                shutil.rmtree(path)


def restore(
    path: Path,
    device: torch.device,
    *,
    read_state: StateReader = _as_it_is,
    load: Callable[[Path, str, str], Model] = load_model,  # type: ignore[assignment]
) -> tuple[Model, dict[str, torch.Tensor], Progress]:
    """Load a checkpoint and restore the random generators.

    Args:
        path: The folder of the checkpoint.
        device: Device of the model.
        read_state: The inverse of the `write_state` of `Checkpoints`.
        load: Loads the model of a folder, given dtype and device.

    Returns:
        The model in float32, its optimizer state by name for `load_optimizer_state`, and the progress.
    """
    if is_sharded(path):
        return load_object("openmimo.train.sharded:restore")(path, device, read_state=read_state)
    model = load(path, "float32", str(device))
    tensors = load_file(optimizer_file(path), device="cpu")
    set_generators({name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}, device)
    return model, tensors, read_progress(path, read_state)


def optimizer_file(path: Path) -> Path:
    """Return the file of the optimizer's state of a checkpoint that is not in shards."""
    names = (_OPTIMIZER, _OPTIMIZER_BEFORE)
    return next(path / "trainer" / name for name in names if (path / "trainer" / name).exists())


def set_generators(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the random generators from the tensors `rng.*` of a checkpoint."""
    set_rng_state({name.removeprefix("rng."): tensor for name, tensor in tensors.items()}, device)


def read_progress(path: Path, read_state: StateReader = _as_it_is) -> Progress:
    """Return the progress of a checkpoint; see `restore`."""
    progress = config_io.load(Progress, path / "trainer" / "progress.json")
    return replace(progress, loader=read_state(progress.loader, path / "trainer" / _ARRAYS))


def optimizer_state(model: MiMo, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors (not copies) by `<parameter>/<key>`, independent of the order of groups."""
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    model: MiMo,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Any],
    *,
    like: Callable[[torch.Tensor, Any], torch.Tensor] = lambda parameter, value: value,
) -> None:
    """Load a result of `optimizer_state`. Parameters without an entry, such as new MTP heads, keep no state.

    Entries of parameters that this process does not have, because they belong to another pipeline stage, are ignored.

    Args:
        model: The model.
        optimizer: Its optimizer.
        tensors: The tensors, whole, or what `like` takes.
        like: Returns a tensor distributed as a parameter is.
    """
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        if parameter_name not in parameters:
            continue
        parameter = parameters[parameter_name]
        device = "cpu" if key == "step" and not optimizer.defaults.get("fused") else parameter.device
        optimizer.state[parameter][key] = like(parameter, value).to(device)


def is_sharded(path: Path) -> bool:
    """Return whether a checkpoint has its weights and optimizer in shards."""
    return (path / "trainer" / SHARDS).is_dir()


def find_damage(path: Path) -> str | None:
    """Check a checkpoint. Returns a sentence about the first damage, or None if every file matches its checksum."""
    manifest_path = path / "trainer" / _MANIFEST
    if not manifest_path.exists():
        return f"{path} has no trainer/{_MANIFEST}."
    try:
        checksums = json.loads(manifest_path.read_text())
    except (OSError, ValueError, RecursionError):
        return f"{manifest_path} is not readable."
    if not isinstance(checksums, dict):
        return f"{manifest_path} is not a JSON object of file names and checksums."
    listed = {name.replace(_OPTIMIZER_BEFORE, _OPTIMIZER) for name in checksums}
    has_shards = is_sharded(path)
    unlisted = sorted((_REQUIRED_SHARDS if has_shards else _REQUIRED_WHOLE) - listed)
    has_weights = has_shards or any(name.endswith(".safetensors") and "/" not in name for name in checksums)
    if unlisted or not has_weights:
        return f"{manifest_path} does not list {unlisted[0] if unlisted else 'the weights'}."
    for name, expected in checksums.items():
        if not (path / name).is_file():
            return f"{path / name} is missing."
        if checksum(path / name) != expected:
            return f"{path / name} does not match its checksum: it was truncated or changed."
    return _missing_shard(path) if has_shards else None


def _missing_shard(path: Path) -> str | None:
    """Return a sentence about metadata that name a file that does not exist, or None."""
    try:
        load_object("openmimo.parallel.shards:ShardFolder")(path / "trainer" / SHARDS)
    except CheckpointError as error:
        return str(error)
    return None


def generators(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of the random generators as tensors `rng.*` of a checkpoint."""
    return {f"rng.{name}": state for name, state in rng_state(device).items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file with the mode of the umask."""
    with umask_mode(path):
        save_file(tensors, path)


def write_manifest(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the checksum of each file of a checkpoint.

    Args:
        folder: The folder of the checkpoint.
        known: Checksums that the processes of the run have computed already, by name.

    Raises:
        FileNotFoundError: A file of `known` is not there.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    if unseen := sorted(set(known) - set(names)):
        raise FileNotFoundError(
            f"{len(unseen)} of {len(known)} files of other processes, such as {unseen[0]}, are not in the folder that "
            "the main process sees; set run_folder to a shared file system that all machines of the run have mounted"
        )
    manifest = {name: known.get(name) or checksum(folder / name) for name in names}
    (folder / "trainer" / _MANIFEST).write_text(json.dumps(manifest, indent=2))


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
