"""Samples in files. Plain values are stored as JSON, per-token arrays and routes in an `ArrayFile`."""

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np

from openmimo.core.errors import DataError
from openmimo.core.samples import TOKEN_DTYPES, ArrayFile, Sample, StoredArray

_PLAIN = ("domain", "group", "finish_reason", "temperature", "episode", "info")
_FLOATS = ("logprobs", "advantages", "weights", "teacher_logprobs")
_KEY = "sample"


def write_sample(sample: Sample, file: ArrayFile) -> dict[str, Any]:
    """Append the arrays of a sample and of its earlier contexts to the file, without loss of precision.

    Returns:
        The rest of the sample as JSON, with the location of each array. `info` must be JSON already.

    Raises:
        DataError: Expert ids do not fit into int16.
    """
    arrays = {name: getattr(sample, name) for name in TOKEN_DTYPES if len(getattr(sample, name))}
    if sample.routed_experts is not None:
        arrays["routed_experts"] = _narrowed(np.asarray(sample.routed_experts))
    return {name: getattr(sample, name) for name in _PLAIN} | {
        "reward": _number_to_json(sample.reward),
        "arrays": {name: file.append(array).location for name, array in arrays.items()},
        "earlier": [write_sample(context, file) for context in sample.earlier],
    }


def read_sample(values: dict[str, Any], file: ArrayFile) -> Sample:
    """Read a sample that `write_sample` wrote. Its routes remain in the file and are referenced.

    Raises:
        DataError: Unknown or missing fields.
    """
    try:
        arrays = {
            name: StoredArray(file, offset, dtype, tuple(shape))
            for name, (offset, dtype, shape) in values["arrays"].items()
        }
        fields: dict[str, Any] = {name: values[name] for name in _PLAIN}
        fields |= dict.fromkeys(("token_ids", "loss_mask", "logprobs", "versions"), ())
        fields |= {name: stored if name == "routed_experts" else np.array(stored) for name, stored in arrays.items()}
        return Sample(
            **fields,
            reward=_number_from_json(values["reward"]),
            earlier=[read_sample(context, file) for context in values["earlier"]],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"This is not a saved sample: {error!r}.") from error


def refer_to_file(sample: Sample, values: dict[str, Any], file: ArrayFile) -> None:
    """Replace the routes of a sample by references to the arrays that `write_sample` wrote."""
    for context, saved in zip(sample.contexts(), [*values["earlier"], values], strict=True):
        if "routed_experts" in saved["arrays"]:
            offset, dtype, shape = saved["arrays"]["routed_experts"]
            context.routed_experts = StoredArray(file, offset, dtype, tuple(shape))


def write_state(state: Any, path: Path) -> Any:
    """Convert a tree of plain values and samples to JSON. The arrays of the samples go to the file `path`.

    The file is not created for a tree without samples.
    """
    file: ArrayFile | None = None

    def plain(value: Any) -> Any:
        nonlocal file
        if isinstance(value, Sample):
            file = file or ArrayFile(path)
            return {_KEY: write_sample(value, file)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    result = plain(state)
    if file is not None:
        file.sync()
    return result


def read_state(state: Any, path: Path) -> Any:
    """Restore a tree from the result of `write_state`."""
    file = ArrayFile(path, read_only=True) if path.exists() else None

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            if file is not None and value.keys() == {_KEY} and "arrays" in (value[_KEY] or ()):
                return read_sample(value[_KEY], file)
            return {key: restored(item) for key, item in value.items()}
        return [restored(item) for item in value] if isinstance(value, list) else value

    return restored(state)


def sample_from_dict(values: dict[str, Any]) -> Sample:
    """Read a sample in the JSON format of the previous version (NaN as null, infinities as strings, routes as base64).

    Raises:
        DataError: Unknown or missing fields.
    """
    values = dict(values)
    try:
        for name in _FLOATS:
            values[name] = [_number_from_json(item) for item in values[name]]
        values["reward"] = _number_from_json(values["reward"])
        if values["routed_experts"] is not None:
            values["routed_experts"] = _array_from_json(values["routed_experts"])
        values["earlier"] = [sample_from_dict(context) for context in values.get("earlier", ())]
        return Sample(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"This is not a saved sample: {error!r}.") from error


def _number_to_json(value: float) -> float | str | None:
    value = float(value)
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def _number_from_json(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _narrowed(array: np.ndarray) -> np.ndarray:
    """Convert expert ids to uint8 if they fit, else to int16. Arrays of these types are returned unchanged."""
    if array.dtype in (np.uint8, np.int16):
        return array
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < -(2**15) or high >= 2**15:
        raise DataError(f"routed_experts range from {low} to {high}, which does not fit into int16.")
    return array.astype(np.uint8 if low >= 0 and high < 256 else np.int16)


def _array_from_json(values: dict[str, Any]) -> np.ndarray:
    if values["dtype"] not in ("uint8", "int16"):
        raise ValueError(f"routed_experts of dtype {values['dtype']!r}")
    dtype = np.dtype(values["dtype"])
    data = np.frombuffer(base64.b64decode(values["base64"]), dtype=dtype.newbyteorder("<"))
    return data.astype(dtype).reshape(values["shape"])
