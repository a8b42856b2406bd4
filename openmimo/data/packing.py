"""Numbered training rows of a source: windows of a token store, or rows from a random generator.

Row j is a pure function of the seed and j, so a run can resume at any row without state.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from openmimo.data.permutation import permuted
from openmimo.data.source import Row, RowMaker
from openmimo.data.store import TokenStore


class RowSource(Protocol):
    """A source of numbered rows."""

    def row(self, index: int) -> Row:
        """Row `index`. The same index always gives the same row."""
        ...


class StoreRows:
    """Windows of `sequence_length` tokens over a token store, without padding.

    Documents are cut at the ends of rows; `document_lengths` lists the pieces of a row. Each epoch visits every window
    once, in its own permutation and with its own phase, so that documents are cut at other positions. The store is
    circular and must contain at least one row:

        store      | doc 0 |    doc 1    | doc 2 |   doc 3   |      (circular)
        epoch 0      [ window 0 ][ window 1 ][ window 2 ][ wi..     phase 2
        epoch 1    ..0 ][ window 1 ][ window 2 ][ window 0          phase 7

    The permutation is not stored: the position of a row is computed from its number (`permuted`).
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: Sequence[int]):
        self._store = store
        self._sequence_length = sequence_length
        self._num_windows = len(store.token_ids) // sequence_length
        self._seed = tuple(seed)
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)

    def row(self, index: int) -> Row:
        """Row `index`, numbered over consecutive epochs."""
        epoch, index_in_epoch = divmod(index, self._num_windows)
        phase, key = self._epoch(epoch)
        window = permuted(index_in_epoch, self._num_windows, key)
        start = (phase + window * self._sequence_length) % len(self._store.token_ids)
        return _window(self._store, start, self._sequence_length)

    def _make_epoch(self, epoch: int) -> tuple[int, int]:
        """The phase of an epoch, and the key of its permutation."""
        rng = np.random.default_rng([*self._seed, epoch])
        return int(rng.integers(len(self._store.token_ids))), int(rng.integers(2**63))


class SyntheticRows:
    """Rows from a generator that is seeded by the row number."""

    def __init__(self, make_row: RowMaker, seed: Sequence[int]):
        self._make_row = make_row
        self._seed = tuple(seed)

    def row(self, index: int) -> Row:
        """Row `index`. There are no epochs."""
        return self._make_row(np.random.default_rng([*self._seed, index]))


def _window(store: TokenStore, start: int, length: int) -> Row:
    """`length` tokens from `start`, continued at the beginning of the store if it ends."""
    total, end = len(store.token_ids), start + length
    if end <= total:
        return Row(store.token_ids[start:end].astype(np.int32), _piece_lengths(store.offsets, start, end))
    head, tail = store.token_ids[start:], store.token_ids[: end - total]
    return Row(
        np.concatenate([head, tail]).astype(np.int32),
        _piece_lengths(store.offsets, start, total) + _piece_lengths(store.offsets, 0, end - total),
    )


def _piece_lengths(offsets: np.ndarray, start: int, end: int) -> tuple[int, ...]:
    """The lengths of the document pieces between tokens `start` and `end`."""
    first, last = np.searchsorted(offsets, start, side="right"), np.searchsorted(offsets, end, side="left")
    return tuple(np.diff(np.concatenate([[start], offsets[first:last], [end]])).tolist())
