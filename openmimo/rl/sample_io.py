"""Samples as plain JSON and back, and files of them: one JSON object a line."""

import base64
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from openmimo.core.errors import DataError
from openmimo.core.samples import Sample

_FLOAT_LISTS = ("logprobs", "advantages", "weights", "teacher_logprobs")
_INTEGER_LISTS = ("token_ids", "versions")


def sample_to_dict(sample: Sample) -> dict[str, Any]:
    """A sample as JSON: NaN is null, infinities are strings, routed experts are base64 of uint8 or int16.

    `info` goes in as it is, so it must be JSON already. Raises DataError for expert ids beyond int16.
    """
    values = {name: [int(item) for item in getattr(sample, name)] for name in _INTEGER_LISTS}
    values |= {name: [_number_to_json(item) for item in getattr(sample, name)] for name in _FLOAT_LISTS}
    return values | {
        "loss_mask": [bool(item) for item in sample.loss_mask],
        "domain": sample.domain,
        "group": sample.group,
        "reward": _number_to_json(sample.reward),
        "finish_reason": sample.finish_reason,
        "temperature": sample.temperature,
        "routed_experts": None if sample.routed_experts is None else _array_to_json(np.asarray(sample.routed_experts)),
        "episode": sample.episode,
        "earlier": [sample_to_dict(context) for context in sample.earlier],
        "info": sample.info,
    }


def sample_from_dict(values: dict[str, Any]) -> Sample:
    """The sample that `sample_to_dict` was given. Raises DataError for unknown or missing fields."""
    values = dict(values)
    try:
        for name in _FLOAT_LISTS:
            values[name] = [_number_from_json(item) for item in values[name]]
        values["reward"] = _number_from_json(values["reward"])
        if values["routed_experts"] is not None:
            values["routed_experts"] = _array_from_json(values["routed_experts"])
        values["earlier"] = [sample_from_dict(context) for context in values.get("earlier", ())]
        return Sample(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"This is not a saved sample: {error!r}.") from error


def append_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Adds samples to a file of JSON lines, on the disk when this returns. A line that a crash cut short is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(sample_to_dict(sample)) + "\n" for sample in samples)
    with open(path, "ab+") as file:
        remove_cut_line(file)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file of JSON lines; a last line that a crash cut short is left out.

    Raises DataError, naming the line, for what is not a sample.
    """
    samples = []
    lines = Path(path).read_text().split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is nothing, or cut short
        try:
            samples.append(sample_from_dict(json.loads(line)))
        except (json.JSONDecodeError, DataError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a saved sample ({error}).") from error
    return samples


def remove_cut_line(file: Any) -> None:
    """Cuts a file that is open for reading and writing bytes after its last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    file.truncate(end)


def _number_to_json(value: float) -> float | str | None:
    value = float(value)
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def _number_from_json(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _array_to_json(array: np.ndarray) -> dict[str, Any]:
    if array.dtype not in (np.uint8, np.int16):
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if low < -(2**15) or high >= 2**15:
            raise DataError(f"routed_experts go from {low} to {high}, which int16 cannot hold.")
        array = array.astype(np.uint8 if low >= 0 and high < 256 else np.int16)
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": base64.b64encode(data).decode()}


def _array_from_json(values: dict[str, Any]) -> np.ndarray:
    if values["dtype"] not in ("uint8", "int16"):
        raise ValueError(f"routed_experts of dtype {values['dtype']!r}")
    dtype = np.dtype(values["dtype"])
    data = np.frombuffer(base64.b64decode(values["base64"]), dtype=dtype.newbyteorder("<"))
    return data.astype(dtype).reshape(values["shape"])
