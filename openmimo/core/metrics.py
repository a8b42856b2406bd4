"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and the same numbers for TensorBoard on demand."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openmimo.core.files import write_text_atomic


class MetricsWriter:
    """Appends to `folder/metrics.jsonl`; with `tensorboard=True` also writes event files to `folder/tensorboard`.

    A resumed run calls `truncate_after(step)` first, so that steps which are run again do not stand there twice.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._tensorboard = None
        if tensorboard:
            from tensorboard.summary import Writer  # an import of seconds: only where it is asked for

            self._tensorboard = Writer(str(folder / "tensorboard"))

    def truncate_after(self, step: int) -> None:
        """Drops the lines of steps later than `step`, and a last line that a crash left half written."""
        if not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_text_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Records `values` (numbers, strings or lists of numbers) at optimiser step `step`.

        NaN and infinities are no JSON: they are left out, or null in a list.
        """
        with open(self.path, "a") as file:
            file.write(json.dumps(_json({"step": step, **values}), allow_nan=False) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def close(self) -> None:
        """Closes the TensorBoard writer, if there is one."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def _json(value: Any) -> Any:
    """The same without numbers that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        plain = {key: _json(item) for key, item in value.items()}
        return {key: item for key, item in plain.items() if item is not None}
    return [_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    return list(_rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) - 1:
                return
            raise
