"""The tensors of a checkpoint in shards, with torch.distributed.checkpoint (DCP): each process writes what it holds.

The folder has one file of each process, and `.metadata` with the shape of each tensor and the place of each of its
parts. Any process of any mesh, or one process alone, reads the parts that it needs.
"""

import io
import pickle
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, async_save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from openmimo.core.errors import CheckpointError
from openmimo.core.files import file_in_folder, listed
from openmimo.parallel.boxes import Box, local_box, size_of, slices_of
from openmimo.parallel.gradients import local_part
from openmimo.parallel.mesh import LONG_TIMEOUT

METADATA = ".metadata"
_ALLOWED = {
    ("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
} | {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip


class BackgroundGroup:
    """All processes of a run, for messages of threads that run next to training.

    Attributes:
        group: The group.
        rank: The number of this process.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)  # files can take long to write
        self.rank = dist.get_rank()

    def gather(self, value: Any) -> list[Any]:
        """Return the values (which are pickled) of all processes."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> "Future[Metadata]":
    """Copy the parts that this process holds to CPU memory, and begin to write them. All processes call it together.

    Args:
        folder: The folder, which is empty or does not exist.
        tensors: The tensors that this process has, by name. A distributed tensor is written in parts, another by one
            process.
        group: A group for this purpose only, because a thread uses it.

    Returns:
        A future that is done when all processes have written their parts.
    """
    saved = async_save(
        {name: tensor.detach() for name, tensor in tensors.items()},
        storage_writer=FileSystemWriter(folder),
        process_group=group,
    )
    assert isinstance(saved, Future), "the writer copies the tensors before the call returns"
    return saved


def files_of(folder: Path, rank: int) -> list[Path]:
    """Return the files that process `rank` has written; process 0 also writes the metadata."""
    files = sorted(folder.glob(f"__{rank}_*.distcp"))
    return [folder / METADATA, *files] if rank == 0 else files


def reason_of(error: BaseException) -> str:
    """Return the message of an error of `write_shards`, without the traceback that DCP puts into it."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return str(next(iter(failures.values()))[0]) if failures else str(error)


def read_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill tensors in place. A distributed tensor gets the part that this process holds.

    Args:
        folder: The folder that `write_shards` has written.
        tensors: The tensors by name.

    Raises:
        CheckpointError: A tensor is missing or has another shape, or a file cannot be read.
    """
    stored = ShardFolder(folder)
    lost = sorted(name for name in tensors if name not in stored.tensors)
    other = sorted(name for name in tensors if name not in lost and stored.tensors[name].size != tensors[name].shape)
    if lost or other:
        what = f"does not hold {listed(lost, ', ')}" if lost else f"holds {listed(other, ', ')} in another shape"
        raise CheckpointError(f"{folder} {what}; it belongs to another model or optimizer.")
    for name, tensor in tensors.items():
        stored.read_into(local_part(tensor), name, local_box(tensor))


class ShardFolder:
    """The tensors of a checkpoint in shards, read in parts by one process.

    Args:
        folder: The folder that `write_shards` has written.

    Attributes:
        tensors: Shape, dtype and parts of each tensor by name.

    Raises:
        CheckpointError: The metadata are missing or damaged.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._reader = _Reader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        entries = metadata.state_dict_metadata.items()
        self.tensors = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        for file in sorted({str(part.relative_path) for part in metadata.storage_data.values()}):
            if file_in_folder(folder, file) is None:
                raise CheckpointError(f"{folder / file} is missing. The checkpoint is damaged.")

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Return a part of a tensor. Raises CheckpointError if a file cannot be read."""
        part = torch.empty(size_of(box), dtype=self.tensors[name].properties.dtype)
        self.read_into(part, name, box)
        return part

    def read_into(self, part: torch.Tensor, name: str, box: Box) -> None:
        """Copy a part of a tensor to `part`. Raises CheckpointError if a file cannot be read."""
        chunk = ChunkStorageMetadata(torch.Size(start for start, _ in box), torch.Size(size_of(box)))
        plan = LoadPlan(create_read_items_for_chunk_list(name, self.tensors[name], [chunk]))
        try:
            self._reader.read_data(plan, _Part(part)).wait()
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self._folder}: {name} cannot be read ({error}). It is damaged.") from error


class _Part(DefaultLoadPlanner):
    """The destination of the reads of one part of one tensor."""

    def __init__(self, part: torch.Tensor):
        super().__init__()
        self._part = part.detach()

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        ends = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._part[slices_of((start, start + length) for start, length in ends)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class _Reader(FileSystemReader):
    """A reader that runs no code of the metadata file, which is a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except (
            OSError,
            ValueError,
            EOFError,
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            pickle.UnpicklingError,
        ) as error:
            raise CheckpointError(f"{path} cannot be read ({error}). The checkpoint is damaged.") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} does not describe a checkpoint.")
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
