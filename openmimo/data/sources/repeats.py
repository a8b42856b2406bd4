"""A random segment of tokens repeated to the end: what a model learns induction (copying from context) on."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from openmimo.core.errors import DataError
from openmimo.data.needles import needle_symbols
from openmimo.data.source import Row, RowMaker, SyntheticSource
from openmimo.data.synthetic import document_lengths, join_documents, length_range
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """min_period, max_period: tokens of the repeated segment. min_length, max_length: tokens of a document, drawn
    log-uniformly (max_length 0: the row). alphabet: "vocabulary" draws from all tokens but the special ones,
    "characters" from the keys and values of source `needles`. loss: which tokens count, "repeats" (all after the first
    period, which nothing can predict) or "all".
    """

    min_period: int = 8
    max_period: int = 24
    min_length: int = 64
    max_length: int = 0
    alphabet: Literal["vocabulary", "characters"] = "vocabulary"
    loss: Literal["repeats", "all"] = "all"


def row_maker(options: Options, tokenizer: Tokenizer, sequence_length: int) -> RowMaker:
    """Rows of whole documents, each ended by the end-of-text token."""
    if not 1 <= options.min_period <= options.max_period:
        raise DataError(
            f"Source 'repeats' has min_period {options.min_period} and max_period {options.max_period}; "
            "periods must be at least 1, and the range must not be empty."
        )
    alphabet = _alphabet(options, tokenizer)
    shortest, longest = length_range(
        sequence_length,
        min_length=options.min_length,
        max_length=options.max_length,
        smallest=2 * options.max_period + 1,
        source="repeats",
    )

    def make_row(rng: np.random.Generator) -> Row:
        documents, masks = [], []
        for length in document_lengths(sequence_length, shortest=shortest, longest=longest, rng=rng):
            period = int(rng.integers(options.min_period, options.max_period + 1))
            segment = rng.choice(alphabet, period)
            documents.append(np.append(np.resize(segment, length - 1), np.int32(tokenizer.end_of_text_id)))
            positions = np.arange(length)
            masks.append((positions >= period) & (positions < length - 1))
        return join_documents(documents, masks if options.loss == "repeats" else None)

    return make_row


def _alphabet(options: Options, tokenizer: Tokenizer) -> np.ndarray:
    if options.alphabet == "characters":
        symbols = needle_symbols(tokenizer)
        return np.array(symbols.keys + symbols.values, dtype=np.int32)
    ids = np.arange(tokenizer.vocab_size, dtype=np.int32)
    return np.setdiff1d(ids, np.array(sorted(tokenizer.special_token_ids), dtype=np.int32))


PLUGIN = SyntheticSource(
    describe="a random segment of tokens repeated to the end of the document (options: min_period, max_period, ...)",
    options=Options,
    row_maker=row_maker,
)
