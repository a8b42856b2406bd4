"""Messages between the ranks of an engine: records with tensors, as one block of bytes.

    length of the record | the record, pickled, with a place for each tensor | the bytes of all tensors

So a message is one write, and its tensors are one copy to an accelerator. Only the program that started a rank writes
to it (a pipe without a name), so the record may be pickled.
"""

import io
import pickle
from typing import Any

import numpy as np
import torch

_ALIGNMENT_BYTES = 16
_LENGTH_BYTES = 8
_Place = tuple[int, int, torch.dtype, tuple[int, ...]]  # first byte, number of bytes, dtype, shape


class _Writer(pickle.Pickler):
    """Replaces tensors by their places."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.parts: list[bytes] = []
        self._num_bytes = 0

    def persistent_id(self, obj: Any) -> _Place | None:
        """The place of a tensor; None for other objects."""
        if not isinstance(obj, torch.Tensor):
            return None
        data = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        place = (self._num_bytes, len(data), obj.dtype, tuple(obj.shape))
        padding = -len(data) % _ALIGNMENT_BYTES
        self.parts += [data, bytes(padding)]
        self._num_bytes += len(data) + padding
        return place


class _Reader(pickle.Unpickler):
    """Replaces places by views of the bytes of the message."""

    def __init__(self, file: io.BytesIO, data: torch.Tensor):
        super().__init__(file)
        self._data = data

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """The tensor of a place."""
        first, num_bytes, dtype, shape = pid
        return self._data[first : first + num_bytes].view(dtype).view(shape)


def encoded(record: object) -> bytes:
    """Return a record of tuples, numbers, texts, arrays and tensors as bytes."""
    file = io.BytesIO()
    writer = _Writer(file)
    writer.dump(record)
    pickled = file.getvalue()
    return b"".join([len(pickled).to_bytes(_LENGTH_BYTES, "little"), pickled, *writer.parts])


def decoded(message: bytes, device: torch.device | str = "cpu") -> Any:
    """Return the record of a message. Its tensors are on the device, and share the memory of one tensor."""
    stop = _LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "little")
    data = torch.empty(len(message) - stop, dtype=torch.uint8, pin_memory=torch.device(device).type != "cpu")
    data.numpy()[:] = np.frombuffer(message, dtype=np.uint8, offset=stop)
    return _Reader(io.BytesIO(message[_LENGTH_BYTES:stop]), data.to(device, non_blocking=True)).load()
