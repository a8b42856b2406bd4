"""The routed experts of one sequence, as they are recorded.

L sparse layers, A active experts.
"""

import numpy as np

_FIRST_ROWS = 64


class RoutedRows:
    """An array [positions, L, A] that grows at its end. The space doubles when full, so appending has constant cost."""

    def __init__(self) -> None:
        self._space: np.ndarray | None = None
        self._num_rows = self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, rows: np.ndarray) -> None:
        """Adds the experts of the next positions, integers [rows, L, A]. They are copied."""
        start = self._length
        stop = start + len(rows)
        if stop > self._num_rows:
            self._grow(stop, rows)
        self._space[start:stop] = rows
        self._length = stop

    def between(self, start: int, stop: int) -> np.ndarray:
        """The rows of positions `start` to `stop`, a view that is valid until the next `append`."""
        assert self._space is not None and 0 <= start <= stop <= self._length
        return self._space[start:stop]

    def continued(self) -> "RoutedRows":
        """Rows that begin with these and grow on in the same memory; these must not grow any more."""
        other = RoutedRows()
        other._space, other._num_rows, other._length = self._space, self._num_rows, self._length
        return other

    def _grow(self, needed: int, rows: np.ndarray) -> None:
        self._num_rows = max(needed, 2 * self._num_rows, _FIRST_ROWS)
        grown = np.empty((self._num_rows, *rows.shape[1:]), rows.dtype if self._space is None else self._space.dtype)
        if self._length:
            grown[: self._length] = self.between(0, self._length)
        self._space = grown
