"""The routed experts of one sequence, as they are recorded.

L sparse layers, A active experts.
"""

import numpy as np

_FIRST_ROWS = 64


class RoutedRows:
    """An array [positions, L, A] that grows at its end. The space doubles when full, so appending has constant cost."""

    def __init__(self) -> None:
        self._space: np.ndarray | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, rows: np.ndarray) -> None:
        """Adds the experts of the next positions, integers [rows, L, A]. They are copied."""
        if self._space is None:
            self._space = np.empty((_FIRST_ROWS, *rows.shape[1:]), dtype=rows.dtype)
        needed = self._length + len(rows)
        if needed > len(self._space):
            grown = np.empty((max(needed, 2 * len(self._space)), *self._space.shape[1:]), dtype=self._space.dtype)
            grown[: self._length] = self.between(0, self._length)
            self._space = grown
        self._space[self._length : needed] = rows
        self._length = needed

    def between(self, start: int, stop: int) -> np.ndarray:
        """The rows of positions `start` to `stop`, a view that is valid until the next `append`."""
        assert self._space is not None and 0 <= start <= stop <= self._length
        return self._space[start:stop]

    def continued(self) -> "RoutedRows":
        """Rows that begin with these and grow on in the same memory; these must not grow any more."""
        other = RoutedRows()
        other._space, other._length = self._space, self._length
        return other
