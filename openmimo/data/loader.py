"""Batches of packed rows of a mixture for the trainer, deterministic and resumable at any row.

Row i of a stage is a pure function of (seed, stage, i). The state of a loader is therefore the number of consumed rows,
and a run can resume with a different number of processes or workers.
"""

import concurrent.futures
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.data.config import MixtureConfig
from openmimo.data.mixing import MixtureRows, open_mixture
from openmimo.data.source import Row
from openmimo.data.tokenizer import Tokenizer

_VALIDATION_SEED = (0, 0)  # fixed, so that runs with different seeds are evaluated on the same rows


@dataclass(frozen=True)
class Batch:
    """Packed rows; T = rows x sequence_length.

    Attributes:
        token_ids: int32 [T].
        document_lengths: The lengths of the document pieces over all rows, in order. They add up to T, and no piece
            crosses the end of a row.
        loss_mask: bool [T], False where the token is not a label; None: all are labels.
        source_rows: Number of rows by source.
    """

    token_ids: np.ndarray
    document_lengths: tuple[int, ...]
    loss_mask: np.ndarray | None
    source_rows: dict[str, int]


def prepare_mixture(
    mixture: MixtureConfig, tokenizer: Tokenizer, *, sequence_length: int, with_validation: bool
) -> None:
    """Fetch, tokenize and check the data of a stage before it begins.

    In a multi-process run, one process calls this before the others continue. Raises ConfigError or DataError as
    `Loader` and, with `with_validation`, `Loader.fixed_batches` would.
    """
    sources = open_mixture(mixture, tokenizer, sequence_length)
    for split in ("train", "validation") if with_validation else ("train",):
        MixtureRows(sources, split, _VALIDATION_SEED)
        for source in sources:
            source.rows(split, _VALIDATION_SEED).row(0)


class Loader:
    """The rows of one training stage.

    Process `rank` of `world_size` receives rows rank, rank + world_size, ... `num_workers` threads prepare rows in
    advance; the rows do not depend on their number.

    Attributes:
        sources: The opened sources.
    """

    def __init__(
        self,
        mixture: MixtureConfig,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        seed: int,
        stage: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ):
        """
        Args:
            mixture: The sources.
            tokenizer: Tokenizer of the text sources.
            sequence_length: Tokens of a row.
            seed: Seed of the order of rows.
            stage: Number of the training stage; each stage has a different order.
            rank: Index of this process.
            world_size: Number of processes.
            num_workers: Threads that prepare rows in advance.

        Raises:
            ConfigError: A source does not exist, or an argument is out of range.
            DataError: A source cannot be read or does not fill a row.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; it must be at least 0 and below world_size, which is {world_size}.")
        if seed < 0 or sequence_length < 1:
            raise ConfigError(f"seed is {seed} and sequence_length {sequence_length}; they must be at least 0 and 1.")
        self.sources = open_mixture(mixture, tokenizer, sequence_length)
        self._train = MixtureRows(self.sources, "train", (seed, stage))
        self._identity = {
            "seed": seed,
            "stage": stage,
            "sequence_length": sequence_length,
            "tokenizer": tokenizer.fingerprint,
        }
        self._rank, self._world_size = rank, world_size
        self._rows_consumed = 0
        self._workers = concurrent.futures.ThreadPoolExecutor(num_workers) if num_workers else None
        self._ahead: dict[int, concurrent.futures.Future[tuple[str, Row]]] = {}

    @property
    def rows_consumed(self) -> int:
        """Rows used so far by all processes together."""
        return self._rows_consumed

    def next_batch(self, num_rows: int) -> Batch:
        """Return this process's next `num_rows` rows."""
        indices = self._indices(self._rows_consumed, num_rows)
        self._rows_consumed += num_rows * self._world_size
        if self._workers is None:
            return _join(self._train.row(index) for index in indices)
        self._make_ahead(indices)
        rows = [self._ahead.pop(index) for index in indices]
        self._make_ahead(self._indices(self._rows_consumed, 2 * num_rows))
        return _join(row.result() for row in rows)

    def fixed_batches(self, num_rows: int, num_batches: int) -> Iterator[Batch]:
        """Yield the first rows of the held-out split, mixed by weight. Every call and process yields the same batches.

        After one pass over the held-out documents, rows repeat with other document boundaries.
        """
        for batch in range(num_batches):
            indices = range(batch * num_rows, (batch + 1) * num_rows)
            yield _join(self._validation.row(index) for index in indices)

    def state(self) -> dict[str, Any]:
        """Return the state for resuming as plain JSON."""
        sources = [{**source.identity, "place": source.place} for source in self.sources]
        return {"rows_consumed": self._rows_consumed, **self._identity, "sources": sources}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue after the rows that `state` has consumed.

        Raises:
            CheckpointError: The state belongs to other data, weights, row length, tokenizer, stage or seed. The
                location of the data may differ.
        """
        for key, current in self._identity.items():
            if state.get(key) != current:
                raise CheckpointError(
                    f"The saved loader state has {key} {state.get(key)!r}, but this run has {current!r}, so its rows "
                    f"differ. Resume with the same {key}, or set another run_folder for a new run."
                )
        self._check_sources(state.get("sources", []))
        self._drop_ahead()
        self._rows_consumed = state["rows_consumed"]

    def _check_sources(self, saved: list[dict[str, Any]]) -> None:
        advice = "or set another run_folder for a new run."
        if len(saved) != len(self.sources):
            raise CheckpointError(
                f"The saved loader state has {len(saved)} sources, but this run has {len(self.sources)}. Resume with "
                f"the same sources, {advice}"
            )
        for source, before in zip(self.sources, saved, strict=True):
            for key, current in source.identity.items():
                saved_value = before.get(key)
                if saved_value == current:
                    continue
                if key == "content":
                    raise CheckpointError(
                        f"The data of {source.place} has changed: the run was started on content {short(saved_value)}, "
                        f"read as {before.get('place')}; now it is {short(current)}. Restore the old data, {advice}"
                    )
                raise CheckpointError(
                    f"The saved loader state has {key} {saved_value!r} for {before.get('place')}, but this run has "
                    f"{current!r} for {source.place}. Resume with the same {key}, {advice}"
                )

    def close(self) -> None:
        """Shut down the workers, if any."""
        self._drop_ahead()
        if self._workers is not None:
            self._workers.shutdown()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @functools.cached_property
    def _validation(self) -> MixtureRows:
        return MixtureRows(self.sources, "validation", _VALIDATION_SEED)

    def _indices(self, first: int, num_rows: int) -> range:
        """Return the row numbers of this process if all processes continue from row `first`."""
        return range(first + self._rank, first + num_rows * self._world_size, self._world_size)

    def _make_ahead(self, indices: range) -> None:
        assert self._workers is not None
        for index in indices:
            if index not in self._ahead:
                self._ahead[index] = self._workers.submit(self._train.row, index)

    def _drop_ahead(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()


def short(content: Any) -> str:
    """Return twelve hexadecimal digits of a hash of `content`, for messages."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _join(named_rows: Iterable[tuple[str, Row]]) -> Batch:
    """Join rows to a batch. It has a mask if any row has one."""
    names, rows = zip(*named_rows, strict=True)
    masks = None
    if any(row.loss_mask is not None for row in rows):
        masks = [np.ones(len(r.token_ids), dtype=bool) if r.loss_mask is None else r.loss_mask for r in rows]
    return Batch(
        token_ids=np.concatenate([row.token_ids for row in rows]),
        document_lengths=tuple(length for row in rows for length in row.document_lengths),
        loss_mask=None if masks is None else np.concatenate(masks),
        source_rows=dict(Counter(names)),
    )
