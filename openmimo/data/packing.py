"""Row j of a source: a window of its token store, or made from a random generator. Pure functions of a seed and j."""

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from openmimo.data.permutation import permuted
from openmimo.data.source import Row, RowMaker
from openmimo.data.store import TokenStore


class RowSource(Protocol):
    """What gives numbered rows."""

    def row(self, index: int) -> Row:
        """Row `index`, the same whenever it is asked for."""
        ...


class StoreRows:
    """Windows of `sequence_length` tokens over a token store, filled without gaps: documents are cut at the ends of
    rows, and their pieces are listed in `document_lengths`.

    In each epoch every window comes once, in an order of that epoch, and the windows start at another phase, so that
    documents are cut elsewhere. The store is read as a circle, and must hold at least one row. No order is kept in
    memory: where a row lies is computed from its number.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: Sequence[int]):
        self._store = store
        self._sequence_length = sequence_length
        self._num_windows = len(store.token_ids) // sequence_length
        self._seed = tuple(seed)
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)

    def row(self, index: int) -> Row:
        """Row `index` of all epochs, one after another."""
        epoch, place = divmod(index, self._num_windows)
        phase, key = self._epoch(epoch)
        window = permuted(place, self._num_windows, key)
        start = (phase + window * self._sequence_length) % len(self._store.token_ids)
        return _window(self._store, start, self._sequence_length)

    def _make_epoch(self, epoch: int) -> tuple[int, int]:
        """The phase of an epoch, and the key of its order."""
        rng = np.random.default_rng([*self._seed, epoch])
        return int(rng.integers(len(self._store.token_ids))), int(rng.integers(2**63))


class SyntheticRows:
    """Rows made from a generator that is seeded by the row's number."""

    def __init__(self, make_row: RowMaker, seed: Sequence[int]):
        self._make_row = make_row
        self._seed = tuple(seed)

    def row(self, index: int) -> Row:
        """Row `index`; the rows never repeat."""
        return self._make_row(np.random.default_rng([*self._seed, index]))


def _window(store: TokenStore, start: int, length: int) -> Row:
    """`length` tokens from `start` on, going round the end of the store if need be."""
    total, end = len(store.token_ids), start + length
    if end <= total:
        return Row(store.token_ids[start:end].astype(np.int32), _piece_lengths(store.offsets, start, end))
    head, tail = store.token_ids[start:], store.token_ids[: end - total]
    return Row(
        np.concatenate([head, tail]).astype(np.int32),
        _piece_lengths(store.offsets, start, total) + _piece_lengths(store.offsets, 0, end - total),
    )


def _piece_lengths(offsets: np.ndarray, start: int, end: int) -> tuple[int, ...]:
    """The lengths of the pieces into which document borders cut the tokens from `start` to `end`."""
    first, last = np.searchsorted(offsets, start, side="right"), np.searchsorted(offsets, end, side="left")
    return tuple(np.diff(np.concatenate([[start], offsets[first:last], [end]])).tolist())
