"""A random segment of tokens, repeated to the end of the document: it teaches induction (copying from context)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from openmimo.core.errors import ConfigError
from openmimo.core.fields import NonNegativeInt, PositiveInt
from openmimo.data.source import Row, RowMakers, Split, SyntheticSource
from openmimo.data.synthetic import document_lengths, draw_on_side, join_documents, length_range, makers_by_split
from openmimo.data.tasks._needles import needle_symbols
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """Options of source `repeats`.

    Attributes:
        min_period: Minimum tokens of the repeated segment.
        max_period: Maximum tokens of the repeated segment.
        min_length: Minimum tokens of a document. Lengths are drawn log-uniformly.
        max_length: Maximum tokens of a document (0: the row).
        alphabet: "vocabulary" draws from all tokens except special ones, "characters" from the keys and values of
            source `needles`.
        loss: The tokens that enter the loss: "repeats" (all after the first period, which is unpredictable) or "all".
    """

    min_period: PositiveInt = 8
    max_period: PositiveInt = 24
    min_length: PositiveInt = 64
    max_length: NonNegativeInt = 0
    alphabet: Literal["vocabulary", "characters"] = "vocabulary"
    loss: Literal["repeats", "all"] = "all"

    def __post_init__(self) -> None:
        if self.min_period > self.max_period:
            raise ConfigError(f"Source 'repeats' has min_period {self.min_period} above max_period {self.max_period}.")


def row_makers(options: Options, tokenizer: Tokenizer, sequence_length: int, validation_fraction: float) -> RowMakers:
    """Return makers of rows of whole documents, each with a final end-of-text token."""
    alphabet = _alphabet(options, tokenizer)
    shortest, longest = length_range(
        sequence_length,
        min_length=options.min_length,
        max_length=options.max_length,
        smallest=2 * options.max_period + 1,
        source="repeats",
    )

    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.choice(alphabet, int(rng.integers(options.min_period, options.max_period + 1)))

    def content(segment: np.ndarray) -> np.ndarray:
        return np.resize(segment, 2 * options.max_period)  # equal for segments with the same repetition

    def make_row(rng: np.random.Generator, split: Split) -> Row:
        documents, masks = [], []
        for length in document_lengths(sequence_length, shortest=shortest, longest=longest, rng=rng):
            segment = draw_on_side(
                draw, content, rng, split=split, validation_fraction=validation_fraction, source="repeats"
            )
            documents.append(np.append(np.resize(segment, length - 1), np.int32(tokenizer.end_of_text_id)))
            positions = np.arange(length)
            masks.append((positions >= len(segment)) & (positions < length - 1))
        return join_documents(documents, masks if options.loss == "repeats" else None)

    return makers_by_split(make_row, validation_fraction, "repeats")


def _alphabet(options: Options, tokenizer: Tokenizer) -> np.ndarray:
    if options.alphabet == "characters":
        symbols = needle_symbols(tokenizer)
        return np.array(symbols.keys + symbols.values, dtype=np.int32)
    ids = np.arange(tokenizer.vocab_size, dtype=np.int32)
    return np.setdiff1d(ids, np.array(sorted(tokenizer.special_token_ids), dtype=np.int32))


PLUGIN = SyntheticSource(
    describe="a random segment of tokens repeated to the end of the document (options: min_period, max_period, ...)",
    options=Options,
    row_makers=row_makers,
)
