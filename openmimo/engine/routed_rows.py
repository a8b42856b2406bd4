"""The recorded routed experts of one sequence: a growing array.

L sparse layers, A active experts.
"""

import numpy as np

_FIRST_ROWS = 64


class RoutedRows:
    """An integer array [positions, L, A] that grows at its end.

    The allocated space doubles when it is full, so the amortized cost of an appended row is constant. The next turn of
    a session shares the space of the last one (`continued`) and appends behind it:

        turn 1   | rows 0 to 99 |
        turn 2   | rows 0 to 99 | rows 100 to 149 | free until _num_rows ...

    Turn 1 keeps its own length, so it still sees its 100 rows, but must not append: it would overwrite those of turn 2.
    """

    def __init__(self) -> None:
        self._space: np.ndarray | None = None
        self._num_rows = self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, rows: np.ndarray) -> None:
        """Copies the experts of the next positions, integers [rows, L, A], to the end."""
        start = self._length
        stop = start + len(rows)
        if stop > self._num_rows:
            self._grow(stop, rows)
        assert self._space is not None
        self._space[start:stop] = rows
        self._length = stop

    def between(self, start: int, stop: int) -> np.ndarray:
        """The rows of positions `start` to `stop`: a view, valid until the next `append`."""
        assert self._space is not None and 0 <= start <= stop <= self._length
        return self._space[start:stop]

    def continued(self) -> "RoutedRows":
        """An object with the same rows in the same memory, to append to. `self` must not be appended to any more."""
        other = RoutedRows()
        other._space, other._num_rows, other._length = self._space, self._num_rows, self._length
        return other

    def _grow(self, needed: int, rows: np.ndarray) -> None:
        self._num_rows = max(needed, 2 * self._num_rows, _FIRST_ROWS)
        grown = np.empty((self._num_rows, *rows.shape[1:]), rows.dtype if self._space is None else self._space.dtype)
        if self._length:
            grown[: self._length] = self.between(0, self._length)
        self._space = grown
