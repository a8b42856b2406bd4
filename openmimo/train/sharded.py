"""Checkpoints in shards: every process writes what it holds, while training goes on.

    step            copy of the shards to CPU memory, then training goes on
    a thread        each process writes its file and computes its checksum
                    the main process writes the manifest, and renames the folder

At most one checkpoint is being written. It counts only under its final name, which the folder gets when it is complete,
so that nothing that a killed process leaves is taken for a checkpoint.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from openmimo.core.errors import CheckpointError
from openmimo.core.files import new_folder_atomic
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import write_description
from openmimo.model.hf_files import open_safetensors
from openmimo.model.mimo import MiMo
from openmimo.parallel.boxes import Box, slices_of
from openmimo.parallel.local_weights import StoredTensor
from openmimo.parallel.ranks import Ranks
from openmimo.parallel.shard_reader import read_model, sharded_config
from openmimo.parallel.shards import BackgroundGroup, ShardFolder, files_of, reason_of, write_shards
from openmimo.train.checkpoint import (
    SHARDS,
    Checkpoints,
    Progress,
    StateReader,
    checksum,
    generators,
    is_sharded,
    optimizer_file,
    read_progress,
    set_generators,
    write_manifest,
    write_tensors,
)

_GENERATORS = "generators.safetensors"
_MODEL, _OPTIMIZER = "model.", "optimizer."


class ShardWriter:
    """Writes the checkpoints of a run on several devices. All processes call its methods together.

    Args:
        checkpoints: The checkpoints of the run.
        ranks: The part of this process in the run.
    """

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks):
        self._checkpoints = checkpoints
        self._ranks = ranks
        self._exchange = BackgroundGroup()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._unfinished: Future[None] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the checkpoint that was being written cannot be written; `wait` raises the error."""
        return self._unfinished is not None and self._unfinished.done() and self._unfinished.exception() is not None

    def save(
        self, model: MiMo, optimizer_tensors: dict[str, torch.Tensor], tokenizer: Tokenizer, progress: Progress
    ) -> Path:
        """Begin to write a checkpoint; see `Checkpoints.save`. Returns its folder, which exists when it is complete.

        Raises:
            CheckpointError: The checkpoint before cannot be written, or this one cannot be begun.
        """
        self.wait()
        path = self._checkpoints.path_of(progress.step)
        held = contextlib.ExitStack()
        folder = Path(self._ranks.on_main(lambda: self._begin(held, path, model, tokenizer, progress)))
        tensors = {
            **{_MODEL + name: tensor for name, tensor in model.state_dict().items()},
            **{_OPTIMIZER + name: tensor for name, tensor in optimizer_tensors.items()},
        }
        written = write_shards(folder / "trainer" / SHARDS, tensors, self._exchange.group)
        self._unfinished = self._thread.submit(self._finish, held, folder, path, written)
        return path

    def wait(self) -> None:
        """Wait until the checkpoint in flight is complete. Raises CheckpointError if it cannot be written."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.result()

    @contextlib.contextmanager
    def completed(self) -> Iterator[None]:
        """Complete the checkpoint that is being written at the end of the block, also if the block fails."""
        try:
            yield
        except BaseException:
            try:
                self.wait()
            except (CheckpointError, RuntimeError) as error:  # the latter if another process has ended
                print(f"warning: {error}", file=sys.stderr)
            raise
        self.wait()

    def _begin(
        self, held: contextlib.ExitStack, path: Path, model: MiMo, tokenizer: Tokenizer, progress: Progress
    ) -> str:
        """Write the small files to a new folder that `held` completes or removes. Returns the folder."""
        try:
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(new_folder_atomic(path))
                write_description(model, folder, tokenizer=tokenizer)
                (folder / "trainer").mkdir()
                write_tensors(folder / "trainer" / _GENERATORS, generators(self._ranks.device))
                self._checkpoints.write_progress(folder / "trainer", progress)
                held.push(stack.pop_all())
        except OSError as error:
            raise self._error(path, error) from error
        return str(folder)

    def _finish(self, held: contextlib.ExitStack, folder: Path, path: Path, written: "Future[Any]") -> None:
        """Complete the checkpoint, in a thread of each process. All raise if one of them fails."""
        failure = ""
        try:
            with held:  # gives the folder its final name, or removes it if the block raises
                checksums = self._checksums(folder, path, written)
                if self._exchange.rank == 0:
                    write_manifest(folder, checksums)
            if self._exchange.rank == 0:
                self._checkpoints.delete_old()
        except OSError as error:
            failure = str(error)
        if failure := next(filter(None, self._exchange.gather(failure)), ""):
            raise self._error(path, failure)

    def _checksums(self, folder: Path, path: Path, written: "Future[Any]") -> dict[str, str]:
        """Wait for the files of all processes. Returns their checksums by name."""
        checksums: dict[str, str] = {}
        failure = ""
        try:
            written.result()
            files = files_of(folder / "trainer" / SHARDS, self._exchange.rank)
            checksums = {str(file.relative_to(folder)): checksum(file) for file in files}
        except BaseException as error:  # of any kind, because the other processes wait for an answer
            failure = reason_of(error)
        outcomes = self._exchange.gather((checksums, failure))
        if failure := next(filter(None, (reason for _, reason in outcomes)), ""):
            raise self._error(path, failure)
        return {name: value for part, _ in outcomes for name, value in part.items()}

    def _error(self, path: Path, reason: object) -> CheckpointError:
        return CheckpointError(f"the checkpoint {path} could not be written: {reason}. {self._checkpoints.standing()}")


def restore(
    path: Path, device: torch.device, *, read_state: StateReader
) -> tuple[MiMo, dict[str, torch.Tensor], Progress]:
    """Load a checkpoint in shards on one device; see `train.checkpoint.restore`."""
    config, companions = sharded_config(path)
    model = MiMo(config).to(device)
    model.companions = companions
    read_model(path, model)
    set_generators(load_file(path / "trainer" / _GENERATORS), device)
    tensors = {name: stored.whole() for name, stored in _stored_optimizer(path).items()}
    return model.eval(), tensors, read_progress(path, read_state)


def restore_local(path: Path, ranks: Ranks) -> tuple[MiMo, dict[str, StoredTensor], Progress]:
    """Load a checkpoint of any format on several devices.

    Returns:
        The model, on the meta device until it is distributed, the optimizer's state by name, of which each process will
        read its part, and the progress.
    """
    if is_sharded(path):
        tensors = _stored_optimizer(path)
        states = load_file(path / "trainer" / _GENERATORS)
    else:
        tensors = {}
        with open_safetensors(optimizer_file(path)) as file:
            states = {name: file.get_tensor(name) for name in file.keys() if name.startswith("rng.")}  # noqa: SIM118
            names = set(file.keys()) - set(states)
            for name in names:
                read = functools.partial(_read_slice, optimizer_file(path), name)
                tensors[name] = StoredTensor(file.get_slice(name).get_shape(), read)
    set_generators(states, ranks.device)
    return ranks.load(path).eval(), tensors, read_progress(path)


def _stored_optimizer(path: Path) -> dict[str, StoredTensor]:
    folder = ShardFolder(path / "trainer" / SHARDS)
    return {
        name.removeprefix(_OPTIMIZER): StoredTensor(folder.tensors[name].size, functools.partial(folder.read, name))
        for name in folder.tensors
        if name.startswith(_OPTIMIZER)
    }


def _read_slice(path: Path, name: str, box: Box) -> torch.Tensor:
    with open_safetensors(path) as file:
        return file.get_slice(name)[slices_of(box)] if box else file.get_tensor(name)
