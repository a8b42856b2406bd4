"""Retrieval examples as training rows; `openmimo.data.needles` says what an example is."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from openmimo.data.needles import TOKENS_PER_FACT, make_needle, needle_symbols
from openmimo.data.source import Row, RowMaker, SyntheticSource
from openmimo.data.synthetic import document_lengths, join_documents, length_range
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """num_pairs: facts in an example. num_queries: how many of them are asked (0: all). min_length, max_length: tokens
    of an example, drawn log-uniformly (max_length 0: the row). num_keys, num_values: size of the alphabets. loss: which
    tokens count, "answers" or "all".
    """

    num_pairs: int = 4
    num_queries: int = 0
    min_length: int = 64
    max_length: int = 0
    num_keys: int = 26
    num_values: int = 36
    loss: Literal["answers", "all"] = "all"


def row_maker(options: Options, tokenizer: Tokenizer, sequence_length: int) -> RowMaker:
    """Rows of whole examples, each ended by the end-of-text token."""
    symbols = needle_symbols(tokenizer, num_keys=options.num_keys, num_values=options.num_values)
    num_queries = options.num_queries or options.num_pairs
    shortest, longest = length_range(
        sequence_length,
        min_length=options.min_length,
        max_length=options.max_length,
        smallest=TOKENS_PER_FACT * (options.num_pairs + num_queries) + 1,
        source="needles",
    )
    make_needle(
        symbols, length=longest, num_pairs=options.num_pairs, num_queries=num_queries, rng=np.random.default_rng(0)
    )

    def make_row(rng: np.random.Generator) -> Row:
        documents, masks = [], []
        for length in document_lengths(sequence_length, shortest=shortest, longest=longest, rng=rng):
            example, answers = make_needle(
                symbols, length=length - 1, num_pairs=options.num_pairs, num_queries=num_queries, rng=rng
            )
            documents.append(np.append(example, np.int32(tokenizer.end_of_text_id)))
            mask = np.zeros(length, dtype=bool)
            mask[answers] = True
            masks.append(mask)
        return join_documents(documents, masks if options.loss == "answers" else None)

    return make_row


PLUGIN = SyntheticSource(
    describe="facts hidden in filler and asked at the end, as token ids (options: num_pairs, min_length, ...)",
    options=Options,
    row_maker=row_maker,
)
