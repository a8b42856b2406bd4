"""Samples as plain JSON, or as JSON and binary arrays, and back."""

import base64
import math
from typing import Any

import numpy as np

from openmimo.core.errors import DataError
from openmimo.core.samples import Sample

_FLOAT_LISTS = ("logprobs", "advantages", "weights", "teacher_logprobs")
_INTEGER_LISTS = ("token_ids", "versions")
_PLAIN = ("domain", "group", "finish_reason", "temperature", "episode", "info")
_DTYPES = {"token_ids": "<i4", "versions": "<i4", "loss_mask": "?"} | dict.fromkeys(_FLOAT_LISTS, "<f8")


def sample_to_dict(sample: Sample) -> dict[str, Any]:
    """A sample as JSON: NaN is null, infinities are strings, routed experts are base64 of uint8 or int16.

    `info` goes in as it is, so it must be JSON already. Raises DataError for expert ids beyond int16.
    """
    values = {name: getattr(sample, name).tolist() for name in _INTEGER_LISTS}
    values |= {name: [_number_to_json(item) for item in getattr(sample, name)] for name in _FLOAT_LISTS}
    return values | {
        "loss_mask": sample.loss_mask.tolist(),
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


def pack_sample(sample: Sample) -> tuple[dict[str, Any], bytes]:
    """A sample as JSON, and its lists and routes as bytes, one array after another, those of earlier contexts last.

    Numbers stay what they are to the last bit. Raises DataError for expert ids beyond int16.
    """
    arrays = {name: np.array(getattr(sample, name), dtype) for name, dtype in _DTYPES.items()}
    if sample.routed_experts is not None:
        arrays["routed_experts"] = _narrowed(np.asarray(sample.routed_experts))
    earlier = [pack_sample(context) for context in sample.earlier]
    plain = {name: getattr(sample, name) for name in _PLAIN} | {
        "reward": _number_to_json(sample.reward),
        "arrays": [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()],
        "earlier": [values for values, _ in earlier],
    }
    return plain, b"".join([*(array.tobytes() for array in arrays.values()), *(data for _, data in earlier)])


def unpack_sample(plain: dict[str, Any], data: bytes) -> Sample:
    """The sample that `pack_sample` was given."""
    sample, _ = _unpacked(plain, data, 0)
    return sample


def _unpacked(plain: dict[str, Any], data: bytes, start: int) -> tuple[Sample, int]:
    values: dict[str, Any] = {name: plain[name] for name in _PLAIN} | {"reward": _number_from_json(plain["reward"])}
    for name, dtype, shape in plain["arrays"]:
        count = math.prod(shape)
        array = np.frombuffer(data, np.dtype(dtype), count, start).reshape(shape)
        start += array.nbytes
        values[name] = array.astype(array.dtype.newbyteorder("="))
    values["earlier"] = []
    for own in plain["earlier"]:
        context, start = _unpacked(own, data, start)
        values["earlier"].append(context)
    return Sample(**values), start


def _number_to_json(value: float) -> float | str | None:
    value = float(value)
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def _number_from_json(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _array_to_json(array: np.ndarray) -> dict[str, Any]:
    array = _narrowed(array)
    name = array.dtype.newbyteorder("=").name
    return {"dtype": name, "shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


def _narrowed(array: np.ndarray) -> np.ndarray:
    """Expert ids in the smallest of uint8 and little-endian int16 that holds them; both stay what they are."""
    if array.dtype not in (np.uint8, np.int16):
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if low < -(2**15) or high >= 2**15:
            raise DataError(f"routed_experts go from {low} to {high}, which int16 cannot hold.")
        array = array.astype(np.uint8 if low >= 0 and high < 256 else np.int16)
    return array.astype(array.dtype.newbyteorder("<"))


def _array_from_json(values: dict[str, Any]) -> np.ndarray:
    if values["dtype"] not in ("uint8", "int16"):
        raise ValueError(f"routed_experts of dtype {values['dtype']!r}")
    dtype = np.dtype(values["dtype"])
    data = np.frombuffer(base64.b64decode(values["base64"]), dtype=dtype.newbyteorder("<"))
    return data.astype(dtype).reshape(values["shape"])
