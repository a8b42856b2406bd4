"""Rows of synthetic documents. A row is divided into documents of one drawn length, which are generated in order."""

import math
from collections.abc import Callable
from typing import TypeVar, get_args

import numpy as np

from openmimo.core.errors import DataError
from openmimo.data.source import Row, RowMaker, RowMakers, Split, split_of_bytes

MIN_SHARE = 0.001
Example = TypeVar("Example")


def document_lengths(sequence_length: int, *, shortest: int, longest: int, rng: np.random.Generator) -> list[int]:
    """Divide a row evenly into documents no longer than a length drawn log-uniformly from [shortest, longest]."""
    drawn = math.exp(rng.uniform(math.log(shortest), math.log(longest)))
    drawn = min(max(drawn, shortest), longest)  # exp(log(n)) may differ from n by a rounding error
    number = math.ceil(sequence_length / drawn)
    length, remainder = divmod(sequence_length, number)
    return [length + 1] * remainder + [length] * (number - remainder)


def length_range(
    sequence_length: int, *, min_length: int, max_length: int, smallest: int, source: str
) -> tuple[int, int]:
    """Check the range of document lengths and return (shortest, longest).

    Args:
        sequence_length: Tokens of a row.
        min_length: Shortest document.
        max_length: Longest document (0: the row).
        smallest: The minimum that the task needs.
        source: The name of the source, for messages.

    Raises:
        DataError: The range is empty, exceeds the row, or allows documents shorter than `smallest`.
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
            f"Source {source!r} needs {smallest} tokens per document, but rows of {sequence_length} and min_length "
            f"{min_length} give documents of {shortest_made}. "
            + ("Lengthen the rows." if sequence_length < smallest else "Raise min_length or make the task smaller.")
        )
    return shortest, longest


def makers_by_split(
    make_row: Callable[[np.random.Generator, Split], Row], validation_fraction: float, source: str
) -> RowMakers:
    """Return the row makers of a source with unlimited examples. Raises DataError if a split is too small."""
    if validation_fraction == 0.0:
        return RowMakers({"train": lambda rng: make_row(rng, "train")})
    if not MIN_SHARE <= validation_fraction <= 1.0 - MIN_SHARE:
        raise DataError(
            f"Source {source!r} does not support a validation_fraction of {validation_fraction}, because it draws "
            f"until an example belongs to the requested split. Use {MIN_SHARE} to {1.0 - MIN_SHARE}, or 0."
        )

    def maker(split: Split) -> RowMaker:
        return lambda rng: make_row(rng, split)

    return RowMakers({split: maker(split) for split in get_args(Split)})


def draw_on_side(
    draw: Callable[[np.random.Generator], Example],
    content: Callable[[Example], np.ndarray],
    rng: np.random.Generator,
    *,
    split: Split,
    validation_fraction: float,
    source: str,
) -> Example:
    """Return the first drawn example whose content belongs to `split`.

    Only the first draw uses `rng`; later draws use a spawned generator, so that the rest of a row does not depend on
    the number of draws.

    Raises:
        DataError: The source has too few distinct examples.
    """
    example = draw(rng)
    if split_of_bytes(content(example).tobytes(), validation_fraction) == split:
        return example
    share = validation_fraction if split == "validation" else 1.0 - validation_fraction
    others = rng.spawn(1)[0]
    for _ in range(math.ceil(100 / share)):
        example = draw(others)
        if split_of_bytes(content(example).tobytes(), validation_fraction) == split:
            return example
    raise DataError(
        f"Source {source!r} has too few distinct examples: none of the {split} part was found at validation_fraction "
        f"{validation_fraction}. Make its examples longer or more diverse."
    )


def join_documents(documents: list[np.ndarray], loss_masks: list[np.ndarray] | None) -> Row:
    """Join whole documents to a row. Without masks every token enters the loss."""
    return Row(
        token_ids=np.concatenate(documents),
        document_lengths=tuple(len(document) for document in documents),
        loss_mask=np.concatenate(loss_masks) if loss_masks is not None else None,
    )
