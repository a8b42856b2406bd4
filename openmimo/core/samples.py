"""The records of post-training: token sequences with one number per token for each property, as NumPy arrays.

Rollouts make samples, algorithms annotate them, the trainer reads the annotations. Text is never tokenized again. Long
arrays, such as routes, can be references into a file that only grows.
"""

import math
import mmap
import os
import weakref
import zlib
from dataclasses import dataclass, field, fields
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


TOKEN_DTYPES = {
    "token_ids": np.dtype(np.int32),
    "loss_mask": np.dtype(np.bool_),
    "logprobs": np.dtype(np.float64),
    "versions": np.dtype(np.int32),
    "advantages": np.dtype(np.float64),
    "weights": np.dtype(np.float64),
    "teacher_logprobs": np.dtype(np.float64),
}
ANNOTATIONS = ("advantages", "weights", "teacher_logprobs")


def _no_numbers() -> np.ndarray:
    return np.empty(0)


@dataclass(eq=False)
class Sample:
    """One sequence of the policy. Entry i of a per-token array belongs to token i; T tokens.

    Per-token arrays accept any sequence of numbers when they are set, and are stored with the dtype of `TOKEN_DTYPES`.
    Log-probabilities and annotations are float64: it holds every float32 value of the engine and the trainer exactly.

    Attributes:
        token_ids: int32 [T]. The prompt, the tokens of the policy and the responses of tools, in order.
        loss_mask: bool [T]. The tokens that the policy wrote. Only these enter a loss or a mean.
        logprobs: float64 [T]. log μ(token | tokens before) of the policy that sampled it, at its temperature; 0.0
            outside the mask.
        versions: int32 [T]. The policy version that sampled the token; -1 outside the mask.
        domain: The data source, which names the teacher.
        group: The same for all samples of one prompt.
        reward: Of the verifier, 0 to 1; NaN while the sample is written, and where verification failed.
        finish_reason: "stop", "length", "repetition", "context" (the episode continued in another context), "error"
            (the infrastructure failed: never learned from), or "too_long" (the prompt is: nothing was sampled).
        temperature: At which it was sampled; log-probabilities of every model are taken at it.
        routed_experts: Integers [T - 1, sparse layers, experts a token] of the pass that sampled (R3), in memory or by
            reference to a file (see `routes`); -1 where unknown; None if nothing was recorded.
        advantages: Annotation, float64 [T] or empty: how much better than expected each token was.
        weights: Annotation, float64 [T] or empty: the share of each token in the loss of the step; 0 outside the mask.
        teacher_logprobs: Annotation, float64 [T] or empty: log-probability by the teacher of the domain; NaN where it
            gave none.
        episode: The same for the samples of one episode whose context was replaced; "" for an episode of one sample.
        earlier: The earlier contexts of the episode, oldest first. They have its reward.
        info: For people: the id of the problem, counters of the environment.

    Raises:
        ValueError: Arrays of different lengths, or numbers that a dtype does not hold.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    domain: str = ""
    group: str = ""
    reward: float = math.nan
    finish_reason: str = ""
    temperature: float = 1.0
    routed_experts: np.ndarray | StoredArray | None = None
    advantages: np.ndarray = field(default_factory=_no_numbers)
    weights: np.ndarray = field(default_factory=_no_numbers)
    teacher_logprobs: np.ndarray = field(default_factory=_no_numbers)
    episode: str = ""
    earlier: list["Sample"] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = len(self.token_ids)
        for name in TOKEN_DTYPES:
            length = len(getattr(self, name))
            if length != tokens and (length or name not in ANNOTATIONS):
                raise ValueError(f"A sample of group {self.group!r} has {tokens} tokens, but {length} {name}.")

    def __setattr__(self, name: str, value: Any) -> None:
        dtype = TOKEN_DTYPES.get(name)
        super().__setattr__(name, value if dtype is None else _token_array(name, value, dtype))

    def __len__(self) -> int:
        return len(self.token_ids)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sample):
            return NotImplemented
        return all(_are_equal(getattr(self, own.name), getattr(other, own.name)) for own in fields(self))

    __hash__ = None  # type: ignore[assignment]  # samples are mutable

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the policy wrote."""
        return int(np.count_nonzero(self.loss_mask))

    @property
    def prompt_length(self) -> int:
        """Tokens before the first one that the policy wrote; all of them if it wrote none."""
        return int(self.loss_mask.argmax()) if self.loss_mask.any() else len(self)

    @property
    def routes(self) -> np.ndarray | None:
        """The routed experts as an array; memory-mapped and read-only if they are in a file."""
        return None if self.routed_experts is None else np.asarray(self.routed_experts)

    def written_versions(self) -> np.ndarray:
        """The policy version of each token that the policy wrote, in all contexts, int32."""
        return np.concatenate([context.versions[context.loss_mask] for context in self.contexts()])

    def contexts(self) -> list["Sample"]:
        """All contexts of the episode, this one the last."""
        return [*self.earlier, self]


def _token_array(name: str, values: Any, dtype: np.dtype) -> np.ndarray:
    """The values as an array [T] of the dtype; the same object if it is one.

    Raises:
        ValueError: The dtype cannot hold the values.
    """
    if len(values) == 0:
        return np.zeros(0, dtype)
    array = np.asarray(values)
    if array.dtype == dtype and array.ndim == 1:
        return array
    with np.errstate(invalid="ignore"):
        converted = array.astype(dtype)
    is_exact = np.can_cast(array.dtype, dtype) or (converted == array).all()
    if array.ndim != 1 or not is_exact:
        raise ValueError(
            f"Sample.{name} must be numbers [tokens] that {dtype} holds; it is {array.dtype} {array.shape}."
        )
    return converted


def _are_equal(own: Any, other: Any) -> bool:
    """Equality in which NaN equals NaN and arrays of different dtypes differ."""
    are_arrays = [isinstance(value, np.ndarray | StoredArray) for value in (own, other)]
    if any(are_arrays):
        first, second = np.asarray(own), np.asarray(other)
        is_float = first.dtype.kind == "f"
        return all(are_arrays) and first.dtype == second.dtype and np.array_equal(first, second, equal_nan=is_float)
    is_nan = isinstance(own, float) and math.isnan(own)
    return own == other or (is_nan and isinstance(other, float) and math.isnan(other))
