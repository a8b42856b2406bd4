"""A mixture of sources as numbered rows.

The source of row i, and its row number within that source, are pure functions of the weights, the seed and i. Row j of
a source is a window of its token store, or a row from a random generator: a pure function of the seed and j. So a run
can resume at any row without state.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.data.source import Row, RowMaker, RowMakers, Split, SyntheticSource, open_source
from openmimo.data.store import TokenStore, open_store
from openmimo.data.tokenizer import Tokenizer

ROWS_PER_BLOCK = 1000
_SCHEDULE, _ROWS = 0, 1  # separate random streams of one seed
_ROUNDS = 8  # of the Feistel network
_MASK_64 = 2**64 - 1


class RowSource(Protocol):
    """A source of numbered rows."""

    def row(self, index: int) -> Row:
        """Return row `index`. The same index always gives the same row."""
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
        """Return row `index`, numbered over consecutive epochs."""
        epoch, index_in_epoch = divmod(index, self._num_windows)
        phase, key = self._epoch(epoch)
        window = permuted(index_in_epoch, self._num_windows, key)
        start = (phase + window * self._sequence_length) % len(self._store.token_ids)
        return _window(self._store, start, self._sequence_length)

    def _make_epoch(self, epoch: int) -> tuple[int, int]:
        """Return the phase of an epoch, and the key of its permutation."""
        rng = np.random.default_rng([*self._seed, epoch])
        return int(rng.integers(len(self._store.token_ids))), int(rng.integers(2**63))


class SyntheticRows:
    """Rows from a generator that is seeded by the row number."""

    def __init__(self, make_row: RowMaker, seed: Sequence[int]):
        self._make_row = make_row
        self._seed = tuple(seed)

    def row(self, index: int) -> Row:
        """Return row `index`. There are no epochs."""
        return self._make_row(np.random.default_rng([*self._seed, index]))


def _window(store: TokenStore, start: int, length: int) -> Row:
    """Return `length` tokens from `start`, continued at the beginning of the store if it ends."""
    total, end = len(store.token_ids), start + length
    if end <= total:
        return Row(store.token_ids[start:end].astype(np.int32), _piece_lengths(store.offsets, start, end))
    head, tail = store.token_ids[start:], store.token_ids[: end - total]
    return Row(
        np.concatenate([head, tail]).astype(np.int32),
        _piece_lengths(store.offsets, start, total) + _piece_lengths(store.offsets, 0, end - total),
    )


def _piece_lengths(offsets: np.ndarray, start: int, end: int) -> tuple[int, ...]:
    """Return the lengths of the document pieces between tokens `start` and `end`."""
    first, last = np.searchsorted(offsets, start, side="right"), np.searchsorted(offsets, end, side="left")
    return tuple(np.diff(np.concatenate([[start], offsets[first:last], [end]])).tolist())


class MixtureSchedule:
    """Interleaves sources by weight.

    Each block of 1000 rows contains exactly the share of each source (rounded to 0.1 %), spread evenly with jitter. All
    blocks have the same shares, so any row is located in constant time.

    Raises:
        ConfigError: A share is below 0.1 %.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], seed: Sequence[int]):
        """
        Args:
            names: Names of the sources, for messages.
            weights: Relative shares.
            seed: The integers that determine the order.
        """
        self._seed = tuple(seed)
        self._rows_per_block = _apportion(weights)
        for name, rows in zip(names, self._rows_per_block, strict=True):
            if rows == 0:
                raise ConfigError(
                    f"The weight of source {name!r} is less than 0.1 % of the mixture, which gives it no rows. "
                    "Raise the weight or remove the source."
                )
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    def locate(self, row_index: int) -> tuple[int, int]:
        """Return the source of row `row_index`, and its row number within that source."""
        block, row_in_block = divmod(row_index, ROWS_PER_BLOCK)
        sources, numbers = self._block(block)
        source = int(sources[row_in_block])
        return source, block * int(self._rows_per_block[source]) + int(numbers[row_in_block])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each row of a block, its source and its number among the rows of that source in the block.

        Row n of a source with r rows per block is placed at a random time in [n / r, (n + 1) / r); the block is sorted
        by time.
        """
        rng = np.random.default_rng([*self._seed, block])
        sources = np.repeat(np.arange(len(self._rows_per_block)), self._rows_per_block)
        numbers = np.concatenate([np.arange(rows) for rows in self._rows_per_block])
        times = (numbers + rng.random(ROWS_PER_BLOCK)) / self._rows_per_block[sources]
        order = np.argsort(times, kind="stable")
        return sources[order], numbers[order]


def _apportion(weights: Sequence[float]) -> np.ndarray:
    """Divide the rows of a block among sources by the largest remainder method."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * ROWS_PER_BLOCK
    rows = np.floor(exact + 1e-9).astype(np.int64)
    largest_remainders = np.argsort(rows - exact, kind="stable")
    rows[largest_remainders[: ROWS_PER_BLOCK - rows.sum()]] += 1
    return rows


@dataclass(frozen=True)
class OpenSource:
    """An opened source of a mixture.

    Attributes:
        config: Its configuration.
        sequence_length: Tokens of a row.
        validation_fraction: Share of held-out examples.
        stores: The tokenized documents of a text source, by split; None for a synthetic source.
        makers: The row makers of a synthetic source; None for a text source.
    """

    config: SourceConfig
    sequence_length: int
    validation_fraction: float
    stores: dict[Split, TokenStore] | None
    makers: RowMakers | None

    @property
    def identity(self) -> dict[str, Any]:
        """The properties that determine the rows. Equal data in different folders has equal identities."""
        content: Any
        if self.stores is not None:
            content = {split: store.content for split, store in self.stores.items()}
        else:
            assert self.makers is not None
            content = self.makers.content or self.config.options
        return {
            "name": self.config.name,
            "weight": self.config.weight,
            "validation_fraction": self.validation_fraction,
            "content": content,
        }

    @property
    def place(self) -> str:
        """The source and the path of its data, for messages."""
        path = self.config.options.get("path")
        return f"source {self.config.name!r}" + (f" ({path})" if path else "")

    def rows(self, split: Split, seed: Sequence[int]) -> RowSource:
        """Return the numbered rows of one split. Raises DataError if it has less than a row."""
        if split == "validation" and self.validation_fraction == 0.0:
            raise DataError(
                f"No data of {self.place} is held out for evaluation, because validation_fraction is 0. Set "
                "validation_fraction above 0."
            )
        if self.stores is None:
            return SyntheticRows(self._maker(split), seed)
        num_tokens = len(self.stores[split].token_ids)
        if num_tokens < self.sequence_length:
            side = "raise" if split == "validation" else "lower"
            raise DataError(
                f"The {split} part of {self.place} has {num_tokens} tokens, which do not fill one row "
                f"of {self.sequence_length}: {side} validation_fraction, give it more text, or shorten the rows."
            )
        return StoreRows(self.stores[split], self.sequence_length, seed)

    def _maker(self, split: Split) -> RowMaker:
        assert self.makers is not None
        if split not in self.makers.by_split:
            raise DataError(
                f"The {split} part of {self.place} is empty: none of its examples that fit into a row of "
                f"{self.sequence_length} tokens is held out at validation_fraction {self.validation_fraction}. Raise "
                "it, or give the source more examples."
            )
        return self.makers.by_split[split]


def open_mixture(mixture: MixtureConfig, tokenizer: Tokenizer, sequence_length: int) -> tuple[OpenSource, ...]:
    """Open every source. Texts without a token store are tokenized. Raises ConfigError or DataError."""
    opened = []
    fraction = mixture.validation_fraction
    for config in mixture.sources:
        source, options = open_source(config)
        stores, makers = None, None
        if isinstance(source, SyntheticSource):
            makers = source.row_makers(options, tokenizer, sequence_length, fraction)
        else:
            stores = open_store(config, tokenizer, validation_fraction=fraction)
        opened.append(OpenSource(config, sequence_length, fraction, stores, makers))
    return tuple(opened)


class MixtureRows:
    """One split of a mixture as numbered rows."""

    def __init__(self, sources: Sequence[OpenSource], split: Split, seed: Sequence[int]):
        self._names = [source.config.name for source in sources]
        weights = [source.config.weight for source in sources]
        self._schedule = MixtureSchedule(self._names, weights, [*seed, _SCHEDULE])
        self._rows = [source.rows(split, [*seed, _ROWS, number]) for number, source in enumerate(sources)]

    def row(self, index: int) -> tuple[str, Row]:
        """Return the source's name and row `index`."""
        source, source_index = self._schedule.locate(index)
        return self._names[source], self._rows[source].row(source_index)


def permuted(index: int, size: int, key: int) -> int:
    """Return element `index` of the permutation of range(size) that `key` (64 bits) selects, without a table.

    A Feistel network permutes all numbers of an even number of bits. A result outside the range is permuted again until
    it is inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    assert 0 <= index < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mixed(right + (number << 48), key) & mask)
        index = left << half_bits | right
        if index < size:
            return index


def _mixed(value: int, key: int) -> int:
    """Mix 64 bits with the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + key) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
