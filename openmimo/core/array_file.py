"""Arrays in a file that only grows, and references to them."""

import math
import mmap
import os
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Larger writes are several times slower on Linux; smaller reads are faster without a mapping.
_CHUNK_BYTES = 1 << 20


class ArrayFile:
    """A file of arrays, one after another. It only grows.

    The arrays can be read as long as the file or a `StoredArray` of it is referenced, even after the file was deleted:
    the descriptor is closed with the last reference, and the system frees the space then.

    Args:
        path: Created if it does not exist, unless `read_only`.
        read_only: `append` and `truncate` fail.

    Attributes:
        num_bytes: The length of the file.
        appended_checksum: CRC-32 of the bytes that were appended since it was last set to 0.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, *, read_only: bool = False):
        self._descriptor = os.open(path, os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = os.fstat(self._descriptor).st_size
        self.appended_checksum = 0

    def append(self, array: np.ndarray) -> "StoredArray":
        """Writes an array behind the others. It can be read at once; `sync` brings it to the disk."""
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        stored = StoredArray(self, self.num_bytes, array.dtype.str, array.shape)
        data = array.reshape(-1).view(np.uint8).data
        while len(data):
            written = os.pwrite(self._descriptor, data[:_CHUNK_BYTES], self.num_bytes)
            self.appended_checksum = zlib.crc32(data[:written], self.appended_checksum)
            self.num_bytes += written
            data = data[written:]
        return stored

    def view(self, start: int, stop: int) -> bytes | memoryview:
        """The bytes from `start` to `stop`, memory-mapped if they are many; fewer where the file ends before."""
        stop = min(stop, self.num_bytes)
        if stop - start < _CHUNK_BYTES:
            return os.pread(self._descriptor, max(stop - start, 0), start)
        base = start - start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._descriptor, stop - base, access=mmap.ACCESS_READ, offset=base)
        return memoryview(mapped)[start - base :]

    def checksum(self, start: int, stop: int) -> int:
        """CRC-32 of the bytes from `start` to `stop`."""
        return zlib.crc32(self.view(start, stop))

    def truncate(self, num_bytes: int) -> None:
        """Drops everything from this byte on."""
        os.ftruncate(self._descriptor, num_bytes)
        self.num_bytes = num_bytes

    def sync(self) -> None:
        """Flushes the file to the disk."""
        os.fsync(self._descriptor)


@dataclass(frozen=True)
class StoredArray:
    """An array in a file. `np.asarray` gives its content, read-only. Pickled, it becomes an array in memory."""

    file: ArrayFile
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        count = math.prod(self.shape)
        own = np.dtype(self.dtype)
        data = self.file.view(self.offset, self.offset + count * own.itemsize)
        array = np.frombuffer(data, own, count).reshape(self.shape)
        return array.astype(dtype or own.newbyteorder("="), copy=bool(copy))

    def __reduce__(self) -> tuple[Any, ...]:
        return np.array, (np.array(self),)

    @property
    def location(self) -> list[Any]:
        """Where it is in the file, as JSON."""
        return [self.offset, self.dtype, list(self.shape)]
