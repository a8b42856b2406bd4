"""A mixture of sources as numbered rows.

The source of row i, and its row number within that source, are pure functions of the weights, the seed and i.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.data.packing import RowSource, StoreRows, SyntheticRows
from openmimo.data.source import Row, RowMaker, RowMakers, Split, SyntheticSource, open_source
from openmimo.data.store import TokenStore, open_store
from openmimo.data.tokenizer import Tokenizer

ROWS_PER_BLOCK = 1000
_SCHEDULE, _ROWS = 0, 1  # separate random streams of one seed


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
        """The source of row `row_index`, and its row number within that source."""
        block, row_in_block = divmod(row_index, ROWS_PER_BLOCK)
        sources, numbers = self._block(block)
        source = int(sources[row_in_block])
        return source, block * int(self._rows_per_block[source]) + int(numbers[row_in_block])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of a block, its source and its number among the rows of that source in the block.

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
    """Whole rows per source that add up to a block, by the largest remainder method."""
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
        """What the rows depend on. Equal data in different folders gives equal identities."""
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
        """The numbered rows of one split. Raises DataError if it has less than a row."""
        if split == "validation" and self.validation_fraction == 0.0:
            raise DataError(
                f"Nothing of {self.place} is held out for evaluation, because validation_fraction is 0. Set "
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
    """Opens every source, and tokenizes texts that have no store. Raises ConfigError or DataError."""
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
        """The source's name and row `index`."""
        source, source_index = self._schedule.locate(index)
        return self._names[source], self._rows[source].row(source_index)
