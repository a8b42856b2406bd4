"""Rows of whole conversations, each with a loss mask."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openmimo.data.source import Row


@dataclass(frozen=True)
class Document:
    """A conversation with its end-of-text token.

    Attributes:
        token_ids: int32 [T].
        mask: bool [T], True where the token enters the loss.
    """

    token_ids: np.ndarray
    mask: np.ndarray


def make_document(encoded: tuple[np.ndarray, np.ndarray], end_of_text_id: int) -> Document:
    """Append an end-of-text token, without loss, to a result of `encode_conversation`."""
    token_ids, mask = encoded
    return Document(np.append(token_ids, np.int32(end_of_text_id)), np.append(mask, False))


def join_row(documents: Sequence[Document], sequence_length: int, *, filler: Callable[[], Document]) -> Row:
    """Join `documents`, which must fit, to a row.

    The rest of the row contains documents from `filler` without loss, the last one truncated. Unlike padding, they
    are representative input for the load balancing of experts.
    """
    token_ids = [document.token_ids for document in documents]
    masks = [document.mask for document in documents]
    room = sequence_length - sum(map(len, token_ids))
    while room > 0:
        document = filler()
        cut = document.token_ids[:room].copy()
        cut[-1] = document.token_ids[-1]
        token_ids.append(cut)
        masks.append(np.zeros(len(cut), dtype=bool))
        room -= len(cut)
    return Row(
        token_ids=np.concatenate(token_ids),
        document_lengths=tuple(map(len, token_ids)),
        loss_mask=np.concatenate(masks),
    )
