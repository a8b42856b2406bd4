"""A mixture of sources as numbered rows: which source gives row i, and which of its rows that is.

Both are pure functions of the weights, a seed and i.
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
_SCHEDULE, _ROWS = 0, 1  # separate random numbers under one seed


class MixtureSchedule:
    """Interleaves sources by weight.

    Each block of 1000 rows holds every source exactly by its share (rounded to 0.1 %), spread evenly with jitter. As
    the shares of earlier blocks are known without walking through them, any row is found in constant time.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], seed: Sequence[int]):
        """names: for messages. seed: the integers that the order depends on. A share below 0.1 % is a ConfigError."""
        self._seed = tuple(seed)
        self._rows_per_block = _apportion(weights)
        for name, rows in zip(names, self._rows_per_block, strict=True):
            if rows == 0:
                raise ConfigError(
                    f"The weight of source {name!r} is less than 0.1 % of the mixture, which gives it no rows. "
                    "Raise the weight or take the source out."
                )
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    def locate(self, row_index: int) -> tuple[int, int]:
        """(source, how many rows of that source come before): row `row_index` is that row of that source."""
        block, place = divmod(row_index, ROWS_PER_BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[place])
        return source, block * int(self._rows_per_block[source]) + int(ranks[place])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row of a block, and its rank among the rows of its source."""
        rng = np.random.default_rng([*self._seed, block])
        sources = np.repeat(np.arange(len(self._rows_per_block)), self._rows_per_block)
        ranks = np.concatenate([np.arange(rows) for rows in self._rows_per_block])
        when = (ranks + rng.random(ROWS_PER_BLOCK)) / self._rows_per_block[sources]
        order = np.argsort(when, kind="stable")
        return sources[order], ranks[order]


def _apportion(weights: Sequence[float]) -> np.ndarray:
    """Whole rows per source that add up to a block: rounded down, the rest to the largest remainders."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * ROWS_PER_BLOCK
    rows = np.floor(exact + 1e-9).astype(np.int64)
    largest_remainders = np.argsort(rows - exact, kind="stable")
    rows[largest_remainders[: ROWS_PER_BLOCK - rows.sum()]] += 1
    return rows


@dataclass(frozen=True)
class OpenSource:
    """A source of a mixture, ready to give rows.

    stores: the tokenized documents of a text source, by split; None for a synthetic one, which has `makers`.
    """

    config: SourceConfig
    sequence_length: int
    validation_fraction: float
    stores: dict[Split, TokenStore] | None
    makers: RowMakers | None

    @property
    def identity(self) -> dict[str, Any]:
        """What the rows depend on: equal data gives equal identities wherever it lies."""
        if self.stores is not None:
            content = {split: store.content for split, store in self.stores.items()}
        else:
            content = self.makers.content or self.config.options
        return {
            "name": self.config.name,
            "weight": self.config.weight,
            "validation_fraction": self.validation_fraction,
            "content": content,
        }

    @property
    def place(self) -> str:
        """The source and where its data lies, for messages."""
        path = self.config.options.get("path")
        return f"source {self.config.name!r}" + (f" ({path})" if path else "")

    def rows(self, split: Split, seed: Sequence[int]) -> RowSource:
        """The numbered rows of one split. Raises DataError if it holds too little for a row."""
        if split == "validation" and self.validation_fraction == 0.0:
            raise DataError(
                f"Nothing of {self.place} is held out, as validation_fraction is 0, so there is nothing to evaluate "
                "on. Set validation_fraction above 0."
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
        if split not in self.makers.by_split:
            raise DataError(
                f"The {split} part of {self.place} is empty: none of its examples that fit into a row of "
                f"{self.sequence_length} tokens is held out at validation_fraction {self.validation_fraction}. Raise "
                "it, or give the source more examples."
            )
        return self.makers.by_split[split]


def open_mixture(mixture: MixtureConfig, tokenizer: Tokenizer, sequence_length: int) -> tuple[OpenSource, ...]:
    """Opens every source, tokenizing the texts that no earlier run has. Raises ConfigError or DataError."""
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
