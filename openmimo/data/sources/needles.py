"""Retrieval examples as training rows. `openmimo.data.tasks._needles` defines an example."""

import functools
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from openmimo.core.fields import Bounds, NonNegativeInt, PositiveInt
from openmimo.data.source import Row, RowMakers, Split, SyntheticSource
from openmimo.data.synthetic import document_lengths, draw_on_side, join_documents, length_range, makers_by_split
from openmimo.data.tasks._needles import KEYS, TOKENS_PER_FACT, VALUES, make_needle, needle_symbols
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """Options of source `needles`.

    Attributes:
        num_pairs: Facts per example.
        num_queries: Facts that are queried (0: all).
        min_length: Minimum tokens of an example. Lengths are drawn log-uniformly.
        max_length: Maximum tokens of an example (0: the row).
        num_keys: Size of the alphabet of keys.
        num_values: Size of the alphabet of values.
        loss: The tokens that enter the loss, "answers" or "all".
    """

    num_pairs: PositiveInt = 4
    num_queries: NonNegativeInt = 0
    min_length: PositiveInt = 64
    max_length: NonNegativeInt = 0
    num_keys: Annotated[int, Bounds(least=1, most=len(KEYS))] = len(KEYS)
    num_values: Annotated[int, Bounds(least=1, most=len(VALUES))] = len(VALUES)
    loss: Literal["answers", "all"] = "all"


def row_makers(options: Options, tokenizer: Tokenizer, sequence_length: int, validation_fraction: float) -> RowMakers:
    """Return makers of rows of whole examples, each with a final end-of-text token."""
    symbols = needle_symbols(tokenizer, num_keys=options.num_keys, num_values=options.num_values)
    num_queries = options.num_queries or options.num_pairs
    shortest, longest = length_range(
        sequence_length,
        min_length=options.min_length,
        max_length=options.max_length,
        smallest=TOKENS_PER_FACT * (options.num_pairs + num_queries) + 1,
        source="needles",
    )

    def draw(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        return make_needle(symbols, length=length, num_pairs=options.num_pairs, num_queries=num_queries, rng=rng)

    def make_row(rng: np.random.Generator, split: Split) -> Row:
        documents, masks = [], []
        for length in document_lengths(sequence_length, shortest=shortest, longest=longest, rng=rng):
            example, answers = draw_on_side(
                functools.partial(draw, length=length - 1),
                lambda example_and_answers: example_and_answers[0],
                rng,
                split=split,
                validation_fraction=validation_fraction,
                source="needles",
            )
            documents.append(np.append(example, np.int32(tokenizer.end_of_text_id)))
            mask = np.zeros(length, dtype=bool)
            mask[answers] = True
            masks.append(mask)
        return join_documents(documents, masks if options.loss == "answers" else None)

    draw(np.random.default_rng(0), longest)
    return makers_by_split(make_row, validation_fraction, "needles")


PLUGIN = SyntheticSource(
    describe="facts hidden in filler and queried at the end, as token ids (options: num_pairs, min_length, ...)",
    options=Options,
    row_makers=row_makers,
)
