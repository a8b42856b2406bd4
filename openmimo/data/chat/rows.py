"""Rows of whole conversations, each with a mask of the tokens that count."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openmimo.data.source import Row


@dataclass(frozen=True)
class Document:
    """A conversation and its end-of-text token. token_ids: int32 [T]. mask: bool [T], True where the token counts."""

    token_ids: np.ndarray
    mask: np.ndarray


def make_document(encoded: tuple[np.ndarray, np.ndarray], end_of_text_id: int) -> Document:
    """What `encode_conversation` gave, ended by the end-of-text token, which does not count."""
    token_ids, mask = encoded
    return Document(np.append(token_ids, np.int32(end_of_text_id)), np.append(mask, False))


def join_row(documents: Sequence[Document], sequence_length: int, *, filler: Callable[[], Document]) -> Row:
    """A row of `documents`, which must fit.

    What is left of it is filled with documents from `filler`, the last one cut, of which no token counts: unlike
    padding, they are the text that experts are balanced for.
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
