"""Rows of synthetic documents: a row is divided into documents of one drawn length, which are made one by one."""

import math

import numpy as np

from openmimo.core.errors import DataError
from openmimo.data.source import Row


def document_lengths(sequence_length: int, *, shortest: int, longest: int, rng: np.random.Generator) -> list[int]:
    """Divides a row evenly into documents no longer than a length drawn log-uniformly from [shortest, longest]."""
    drawn = math.exp(rng.uniform(math.log(shortest), math.log(longest)))
    drawn = min(max(drawn, shortest), longest)  # exp(log(n)) may fall a rounding error short of n
    number = math.ceil(sequence_length / drawn)
    length, remainder = divmod(sequence_length, number)
    return [length + 1] * remainder + [length] * (number - remainder)


def length_range(
    sequence_length: int, *, min_length: int, max_length: int, smallest: int, source: str
) -> tuple[int, int]:
    """The checked range of document lengths; a `max_length` of 0 means the row. `smallest` is what the task needs.

    Raises DataError if the range is empty, leaves the row, or allows documents shorter than `smallest`.
    """
    longest = max_length or sequence_length
    shortest = min(min_length, longest)
    if min_length < 1 or longest > sequence_length:
        raise DataError(
            f"Source {source!r} cannot fill rows of {sequence_length} tokens with documents of {min_length} to "
            f"{longest}: min_length must be at least 1, and max_length no more than the row."
        )
    shortest_made = sequence_length // math.ceil(sequence_length / shortest)
    if shortest_made < smallest:
        raise DataError(
            f"Source {source!r} needs {smallest} tokens for a document, but rows of {sequence_length} and min_length "
            f"{min_length} give some of {shortest_made}. Raise min_length or make the task smaller."
        )
    return shortest, longest


def join_documents(documents: list[np.ndarray], loss_masks: list[np.ndarray] | None) -> Row:
    """A row of whole documents; without masks every token counts."""
    return Row(
        token_ids=np.concatenate(documents),
        document_lengths=tuple(len(document) for document in documents),
        loss_mask=np.concatenate(loss_masks) if loss_masks is not None else None,
    )
