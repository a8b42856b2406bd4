"""The records of post-training: token sequences with per-token NumPy arrays.

Rollouts produce samples, algorithms annotate them, and the trainer reads the annotations. Text is never retokenized.
Large arrays, such as routes, can be references into an append-only file.
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

# Larger writes are several times slower on Linux. Smaller reads are faster without memory mapping.
_CHUNK_BYTES = 1 << 20


class ArrayFile:
    """An append-only file of arrays.

    Its arrays remain readable as long as the file or one of its `StoredArray`s is referenced, even after the file was
    deleted. The last reference closes the descriptor, and the system then frees the space.
    Args:
        path: Path of the file, which is created if it does not exist.
        read_only: Whether to open an existing file without `append` and `truncate`.

    Attributes:
        num_bytes: Length of the file.
        appended_checksum: CRC-32 of the bytes appended since it was last set to 0.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, *, read_only: bool = False):
        self._descriptor = os.open(path, os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = os.fstat(self._descriptor).st_size
        self.appended_checksum = 0

    def append(self, array: np.ndarray) -> "StoredArray":
        """Append an array. It can be read immediately; `sync` flushes it to the disk."""
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
        """Return the bytes from `start` to `stop` or the end of the file. Large ranges are memory-mapped."""
        stop = min(stop, self.num_bytes)
        if stop - start < _CHUNK_BYTES:
            return os.pread(self._descriptor, max(stop - start, 0), start)
        base = start - start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._descriptor, stop - base, access=mmap.ACCESS_READ, offset=base)
        return memoryview(mapped)[start - base :]

    def checksum(self, start: int, stop: int) -> int:
        """Return the CRC-32 of the bytes from `start` to `stop`."""
        return zlib.crc32(self.view(start, stop))

    def truncate(self, num_bytes: int) -> None:
        """Truncate the file to `num_bytes`."""
        os.ftruncate(self._descriptor, num_bytes)
        self.num_bytes = num_bytes

    def sync(self) -> None:
        """Flush the file to the disk."""
        os.fsync(self._descriptor)


@dataclass(frozen=True)
class StoredArray:
    """A reference to an array in a file. `np.asarray` reads it, read-only. Pickling converts it to an array."""

    file: ArrayFile
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        count = math.prod(self.shape)
        stored_dtype = np.dtype(self.dtype)
        data = self.file.view(self.offset, self.offset + count * stored_dtype.itemsize)
        array = np.frombuffer(data, stored_dtype, count).reshape(self.shape)
        return array.astype(dtype or stored_dtype.newbyteorder("="), copy=bool(copy))

    def __reduce__(self) -> tuple[Any, ...]:
        return np.array, (np.array(self),)

    @property
    def location(self) -> list[Any]:
        """Offset, dtype and shape as JSON."""
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
    """One sequence of the policy. Entry i of a per-token array belongs to token i of T.

    A per-token array can be set to any sequence of numbers, and is stored with the dtype of `TOKEN_DTYPES`.
    Log-probabilities and annotations are float64, which represents every float32 of engine and trainer exactly.

    Attributes:
        token_ids: int32 [T]. The prompt, the tokens of the policy and the responses of tools, in order.
        loss_mask: bool [T]. True for the tokens of the policy. Only these enter losses and means.
        logprobs: float64 [T]. log μ(token | previous tokens) of the policy that sampled it, at its temperature; 0.0
            outside the mask.
        versions: int32 [T]. The policy version that sampled the token; -1 outside the mask.
        domain: The data source, which determines the teacher.
        group: Identifier of the prompt, equal for all its samples.
        reward: Reward of the verifier, 0 to 1; NaN during generation and after a failed verification.
        finish_reason: "stop", "length", "repetition", "context" (the episode continued in another context), "error"
            (an infrastructure failure; the sample is not trained on), or "too_long" (of a prompt; nothing was sampled).
        temperature: Sampling temperature. The log-probabilities of every model are computed at it.
        routed_experts: Integers [T - 1, sparse layers, experts per token], the routes of the sampling pass (R3), as an
            array or a reference to a file (see `routes`); -1 where unknown; None if not recorded.
        advantages: Annotation, float64 [T] or empty. Advantage of each token.
        weights: Annotation, float64 [T] or empty. Weight of each token in the loss of the step; 0 outside the mask.
        teacher_logprobs: Annotation, float64 [T] or empty. Log-probability under the teacher of the domain; NaN if
            unavailable.
        episode: Identifier of the episode for samples whose context was replaced; "" for an episode of one sample.
        earlier: The earlier contexts of the episode, oldest first. They have the reward of this sample.
        info: Information for inspection, such as the id of the problem and counters of the environment.

    Raises:
        ValueError: The arrays have different lengths, or numbers that do not fit into the dtype.
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
        return all(_are_equal(getattr(self, item.name), getattr(other, item.name)) for item in fields(self))

    __hash__ = None  # type: ignore[assignment]  # samples are mutable

    @property
    def num_answer_tokens(self) -> int:
        """Number of tokens of the policy."""
        return int(np.count_nonzero(self.loss_mask))

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first token of the policy; T if there is none."""
        return int(self.loss_mask.argmax()) if self.loss_mask.any() else len(self)

    @property
    def routes(self) -> np.ndarray | None:
        """The routed experts as an array; read-only and memory-mapped if they are in a file."""
        return None if self.routed_experts is None else np.asarray(self.routed_experts)

    def written_versions(self) -> np.ndarray:
        """Return the policy version of each token of the policy in all contexts, int32."""
        return np.concatenate([context.versions[context.loss_mask] for context in self.contexts()])

    def contexts(self) -> list["Sample"]:
        """Return all contexts of the episode; this one is the last."""
        return [*self.earlier, self]


def _token_array(name: str, values: Any, dtype: np.dtype) -> np.ndarray:
    """Return the values as an array [T] of the dtype; the same object if it already is one.

    Raises:
        ValueError: The values do not fit into the dtype.
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
            f"Sample.{name} must be a 1-D array that fits into {dtype}; it is {array.dtype} {array.shape}."
        )
    return converted


def _are_equal(value: Any, other: Any) -> bool:
    """Return whether values are equal. NaN equals NaN, and arrays of different dtypes differ."""
    are_arrays = [isinstance(item, np.ndarray | StoredArray) for item in (value, other)]
    if any(are_arrays):
        first, second = np.asarray(value), np.asarray(other)
        is_float = first.dtype.kind == "f"
        return all(are_arrays) and first.dtype == second.dtype and np.array_equal(first, second, equal_nan=is_float)
    is_nan = isinstance(value, float) and math.isnan(value)
    return value == other or (is_nan and isinstance(other, float) and math.isnan(other))
