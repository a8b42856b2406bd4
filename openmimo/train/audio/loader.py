"""The documents of one phase in the order of training, packed into rows of a maximum length."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmimo.core.errors import CheckpointError, DataError
from openmimo.model.audio.sequence import AudioSequence, SequenceBuilder, TextPart, packed
from openmimo.train.audio.rows import Row, SplitRows


class AudioLoader:
    """Draws documents from the sources by weight. Each source is shuffled in every pass over it.

    Args:
        sources: The sources.
        builder: Builds sequences.
        codes_of: Returns the codes of a clip.
        sequence_length: The most positions of a row.
        seed: Seed of the order.
        stage: Number of the phase.
        identity: Identifies the tokenizers; a run does not continue with others.

    Raises:
        DataError: A document is longer than a row.
    """

    def __init__(
        self,
        sources: list[SplitRows],
        builder: SequenceBuilder,
        codes_of: Callable[[Path], torch.Tensor],
        *,
        sequence_length: int,
        seed: int,
        stage: int,
        identity: str = "",
    ):
        self._sources, self._builder, self._codes_of = sources, builder, codes_of
        self._length, self._seed, self._stage = sequence_length, seed, stage
        self._identity = f"{identity} {builder.tokenizer.fingerprint}"
        weights = np.array([source.weight for source in sources])
        self._shares = np.cumsum(weights / weights.sum())
        self._taken = [0] * len(sources)
        self._documents = self._rows = 0
        self._kept: dict[int, AudioSequence] = {}
        for source in sources:
            for row in (*source.train, *source.held_out):
                self._document(row)

    @property
    def rows_consumed(self) -> int:
        """Rows used so far."""
        return self._rows

    def next_batch(self, num_rows: int) -> AudioSequence:
        """Return the next rows, packed."""
        self._rows += num_rows
        return packed([document for _ in range(num_rows) for document in self._row()])

    def held_out_batches(self, num_rows: int, num_batches: int) -> Iterator[AudioSequence]:
        """Yield the first held-out documents of all sources in turn, at most as many as fill the rows."""
        most = num_rows * num_batches
        rows = [row for source in self._sources for row in source.held_out[: -(-most // len(self._sources))]][:most]
        for first in range(0, len(rows), num_rows):
            yield packed([self._document(row) for row in rows[first : first + num_rows]])

    def state(self) -> dict[str, Any]:
        """Return the state for resuming as plain JSON."""
        return {
            "taken": list(self._taken),
            "documents": self._documents,
            "rows": self._rows,
            "content": self._fingerprint(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a result of `state`. Raises CheckpointError if rows or tokenizers are others."""
        if state.get("content") != self._fingerprint():
            raise CheckpointError(
                "the rows of the data or the tokenizers are not those with which this run began. Restore them, or "
                "start another run."
            )
        self._taken, self._documents, self._rows = list(state["taken"]), state["documents"], state["rows"]

    def close(self) -> None:
        """Release the sequences that are kept."""
        self._kept.clear()

    def _row(self) -> list[AudioSequence]:
        """Return documents that fit a row together, at least one."""
        documents: list[AudioSequence] = []
        room = self._length
        while True:
            source = self._source()
            document = self._document(self._next_of(source))
            if len(document) > room:
                return documents
            documents.append(document)
            room -= len(document)
            self._taken[source] += 1
            self._documents += 1

    def _source(self) -> int:
        draw = np.random.default_rng([self._seed, self._stage, self._documents]).random()
        return min(int(np.searchsorted(self._shares, draw, side="right")), len(self._sources) - 1)

    def _next_of(self, source: int) -> Row:
        rows = self._sources[source].train
        number_of_pass, place = divmod(self._taken[source], len(rows))
        order = np.random.default_rng([self._seed, self._stage, source, number_of_pass]).permutation(len(rows))
        return rows[int(order[place])]

    def _document(self, row: Row) -> AudioSequence:
        """Return the sequence of a row; a document of pre-training ends with the end of text."""
        if id(row) in self._kept:
            return self._kept[id(row)]
        parts = row.parts(self._codes_of)
        if isinstance(row.value, dict) and "content" in row.value:
            parts.append(TextPart(token_ids=(self._builder.tokenizer.end_of_text_id,), has_loss=True))
        try:
            document = self._builder.build(parts)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        if len(document) > self._length:
            raise DataError(
                f"{row.where} has {len(document)} positions, but sequence_length is {self._length}. Raise it, or cut "
                "the audio."
            )
        self._kept[id(row)] = document
        return document

    def _fingerprint(self) -> str:
        content = hashlib.sha256(str((self._seed, self._stage, self._length, self._identity)).encode())
        for source in self._sources:
            for row in source.train:
                content.update(row.digest)
        return content.hexdigest()[:16]
