"""Metrics of a run: one JSON object per line in `metrics.jsonl`, and optionally TensorBoard event files.

JSON has no NaN and no infinity: a number that is not finite is written as null and read as NaN.
"""

import json
import math
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openmimo.core.files import naming, write_text_atomic

Row = dict[str, Any]


class TimeLeft:
    """States once, from measured steps, how long the rest of some work will take.

    Args:
        num_steps: Measured steps.
        warm_up: Steps before these, which also allocate and compile.
    """

    def __init__(self, num_steps: int = 3, *, warm_up: int = 1):
        self._warm_up, self._num_steps = warm_up, num_steps
        self._num_added = 0
        self._seconds = self._amount = 0.0

    def after_step(self, seconds: float, amount: float, amount_left: float) -> str | None:
        """The sentence after the last measured step; None after every other step, and for less than 30 seconds.

        Args:
            seconds: Duration of the step.
            amount: Its work, such as a number of tokens.
            amount_left: The work after it.
        """
        self._num_added += 1
        last = self._warm_up + self._num_steps
        if not self._warm_up < self._num_added <= last:
            return None
        self._seconds += seconds
        self._amount += amount
        if self._num_added < last or self._amount <= 0:
            return None
        left = self._seconds / self._amount * amount_left
        return f"about {duration_text(left)} left, at the speed so far" if left >= _SHORT_SECONDS else None


_SHORT_SECONDS = 30.0


def duration_text(seconds: float) -> str:
    """A duration in words, rounded: 40 seconds, 12 minutes, 3.5 hours, 2.1 days."""
    for name, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length or (name == "minutes" and seconds >= 90.0):
            return f"{seconds / length:.0f} {name}" if name == "minutes" else f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} seconds"


class MetricsWriter:
    """Appends to `folder/metrics.jsonl`; with `tensorboard=True` also writes event files to `folder/tensorboard`.

    A resumed run calls `truncate_after(step)` first, so that repeated steps are not recorded twice.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._tensorboard = None
        if tensorboard:
            from tensorboard.summary import Writer  # a slow import

            self._tensorboard = Writer(str(folder / "tensorboard"))

    def truncate_after(self, step: int) -> None:
        """Remove the rows of later steps and damaged lines. Warns about damage, except for a truncated last line."""
        if not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_text_atomic(self.path, "".join(_line(row) for row in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` (numbers, strings or lists of numbers) at optimizer step `step`.

        Raises:
            OSError: The file cannot be written (e.g. the disk is full). The error names the file.
        """
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(_line({"step": step, **values}))
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def sync(self) -> None:
        """Flush the file to the disk."""
        with naming(self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the TensorBoard writer, if any."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(path: Path) -> list[Row]:
    """Read the rows of a `metrics.jsonl`. A truncated last line is ignored, other damaged lines give a warning."""
    rows: list[Row] = []
    damaged: list[int] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            damaged.append(number)
    if damaged:
        print(
            f"warning: {path} is damaged; {len(damaged)} of its lines are unreadable and skipped (the first: line "
            f"{damaged[0]}).",
            file=sys.stderr,
        )
    return rows


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return {name: _read(value) for name, value in row.items()}


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(item) for item in value]
    return math.nan if value is None else value


def _line(row: Row) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_RESAMPLES = 1000


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean, from 1,000 resamples. NaN if there are no values."""
    if not values:
        return float("nan"), float("nan")
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(_RESAMPLES))
    return means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]
