"""The expert-load trace of a run: how many tokens each expert of each layer received in each optimizer step.

The file is one line of JSON (the header), then records of equal size: the step as a little-endian uint64, and the
counts as unsigned integers [layers, experts] of the narrowest type that holds the tokens of a step. Records are
appended; a killed run leaves at most one record that is cut short, which readers ignore.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from openmimo.core.errors import ConfigError
from openmimo.core.files import naming, parse_json

TRACE_FILE = "expert_load.bin"
_FORMAT = "openmimo expert load"
_LONGEST_HEADER = 65_536
_LARGEST_RECORD = 2**26
_DTYPES = ("uint8", "uint16", "uint32", "uint64")


@dataclass(frozen=True)
class TraceHeader:
    """What the counts of a trace mean.

    Attributes:
        layers: Layer index of each row of counts.
        num_experts: Experts of a layer.
        experts_per_token: Experts that each token visits.
        dtype: Name of the type of the counts.
    """

    layers: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    dtype: str

    @property
    def record(self) -> np.dtype:
        """The type of one record."""
        counts = np.dtype(self.dtype).newbyteorder("<")
        return np.dtype([("step", "<u8"), ("counts", counts, (len(self.layers), self.num_experts))])

    def line(self) -> bytes:
        """The header as the first line of the file."""
        return json.dumps({"format": _FORMAT, **asdict(self)}).encode() + b"\n"


@dataclass(frozen=True)
class LoadTrace:
    """A trace in memory.

    Attributes:
        header: What the counts mean.
        steps: Optimizer steps, int64 [steps].
        counts: Tokens that each expert received, int64 [steps, layers, experts].
    """

    header: TraceHeader
    steps: np.ndarray
    counts: np.ndarray

    @property
    def slots(self) -> np.ndarray:
        """Routed slots of a layer in each step (tokens x experts per token), int64 [steps, layers]."""
        return self.counts.sum(axis=-1)

    @property
    def shares(self) -> np.ndarray:
        """Share of the routed slots by expert, float64 [steps, layers, experts]. A step without tokens has zeros."""
        return self.counts / np.maximum(self.slots, 1)[..., None]


class LoadTraceWriter:
    """Appends the load of each step to `<folder>/expert_load.bin`.

    Args:
        folder: The run folder.
        layers: Indices of the sparse layers.
        num_experts: Experts of a layer.
        experts_per_token: Experts that each token visits.
        most_tokens: Largest number of tokens of a step, which decides the type of the counts.
        after_step: Records of later steps are removed, because a resumed run repeats them.

    Raises:
        ConfigError: The folder has a trace of another model or batch size, or a file that is no trace.
    """

    def __init__(
        self,
        folder: Path,
        *,
        layers: Sequence[int],
        num_experts: int,
        experts_per_token: int,
        most_tokens: int,
        after_step: int,
    ):
        self.path = folder / TRACE_FILE
        self.header = TraceHeader(
            tuple(layers), num_experts, experts_per_token, np.min_scalar_type(max(most_tokens, 1)).name
        )
        with naming(self.path):
            if self.path.exists() and self.path.stat().st_size:
                self._continue_after(after_step)
            else:
                self.path.write_bytes(self.header.line())

    def _continue_after(self, step: int) -> None:
        header, start = _read_header(self.path)
        if header.record != self.header.record or header != self.header:
            raise ConfigError(
                f"{self.path} is a trace of {header}, and this run would write {self.header}; move the file away."
            )
        records = _read_records(self.path, header, start)
        kept = int(np.searchsorted(records["step"], step, side="right"))
        os.truncate(self.path, start + kept * header.record.itemsize)

    def write(self, step: int, counts_LE: np.ndarray) -> None:
        """Append the load of `step`, integers [layers, experts].

        Raises:
            OSError: The file cannot be written. The error names the file.
        """
        record = np.zeros(1, self.header.record)
        record["step"], record["counts"] = step, counts_LE
        with naming(self.path), open(self.path, "ab") as file:
            file.write(record.tobytes())

    def sync(self) -> None:
        """Flush the file to the disk."""
        with naming(self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())


def read_load_trace(folder: Path) -> LoadTrace:
    """Read the trace of a run folder.

    Raises:
        ConfigError: The folder has no trace, or the file is damaged.
    """
    path = folder / TRACE_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {TRACE_FILE}. Train a model with experts with --expert-trace, which writes it."
        )
    header, start = _read_header(path)
    records = _read_records(path, header, start)
    steps = records["step"].astype(np.int64)
    if len(steps) > 1 and (np.diff(steps) <= 0).any():
        raise ConfigError(f"{path} is damaged: its steps do not rise. Train again, or restore the file.")
    return LoadTrace(header, steps, records["counts"].astype(np.int64))


def _read_header(path: Path) -> tuple[TraceHeader, int]:
    """Return the header and the length of its line."""
    with open(path, "rb") as file:
        line = file.readline(_LONGEST_HEADER)
    damaged = f"{path} is no expert-load trace, or its first line is damaged. Move it away, and train again."
    if not line.endswith(b"\n"):
        raise ConfigError(damaged)
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(damaged) from error
    values = parse_json(text, str(path))
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT or set(values) != _HEADER_KEYS:
        raise ConfigError(damaged)
    layers, sizes = values["layers"], (values["num_experts"], values["experts_per_token"])
    if not isinstance(layers, list) or not layers or not all(_is_count(layer, 0) for layer in layers):
        raise ConfigError(damaged)
    if not all(_is_count(size, 1) for size in sizes) or sizes[1] > sizes[0] or values["dtype"] not in _DTYPES:
        raise ConfigError(damaged)
    if len(layers) * sizes[0] * 8 > _LARGEST_RECORD:
        raise ConfigError(damaged)
    return TraceHeader(tuple(layers), *sizes, values["dtype"]), len(line)


_HEADER_KEYS = {"layers", "num_experts", "experts_per_token", "dtype"}


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _read_records(path: Path, header: TraceHeader, start: int) -> np.ndarray:
    """Return all whole records; the last one is left out if it is cut short."""
    whole = (path.stat().st_size - start) // header.record.itemsize
    return np.fromfile(path, header.record, count=whole, offset=start)
