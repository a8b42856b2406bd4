"""Write a checkpoint folder in the Hugging Face layout, streamed into shards of bounded size."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

_BYTES = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2, torch.float8_e4m3fn: 1}
DEFAULT_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: Name in the checkpoint.
        shape: Shape on disk.
        dtype: Dtype on disk.
        load: Returns the data; called when the tensor is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return _BYTES[self.dtype] * torch.Size(self.shape).numel()


def write_shards(
    folder: Path,
    entries: list[Entry],
    *,
    max_shard_bytes: int,
    on_tensor: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write `entries` to one `model.safetensors`, or to numbered shards with an index; at most one shard is in memory.

    Args:
        folder: An existing folder.
        entries: The tensors, in the order of the files.
        max_shard_bytes: Size limit of a file. A larger tensor gets a file to itself.
        on_tensor: Called with the bytes of each tensor after it is loaded, for a progress bar.
    """
    shards = list(_fill_shards(entries, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for entry in shard:
            tensors[entry.name] = entry.load().to(device="cpu", dtype=entry.dtype).contiguous()
            weight_map[entry.name] = file
            on_tensor(entry.num_bytes)
        with umask_mode(folder / file):
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(entry.num_bytes for entry in entries)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def umask_mode(path: Path) -> Iterator[None]:
    """Give a file that the block writes the mode of the umask; safetensors makes files readable by their owner only."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def _fill_shards(entries: list[Entry], max_shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.num_bytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.num_bytes
    if shard:
        yield shard
