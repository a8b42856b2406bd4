"""Documents as token ids on disk: tokenized once, then memory-mapped by every run with the same settings.

A store is a folder with `store.json` and two files per split:

    <split>.bin           ids of all documents, each with a final end-of-text token; uint16 for a vocabulary of up to
                          65,536, else uint32
    <split>_offsets.bin   start of each document, int64 [documents + 1]

Writing and reading use little memory for documents and stores of any length.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import rich.console
import rich.progress

from openmimo.core.config import read_json, to_dict
from openmimo.core.errors import DataError
from openmimo.core.files import cache_folder, new_folder_atomic, remove_unfinished
from openmimo.data.config import SourceConfig
from openmimo.data.source import Piece, Split, TextSource, divided_documents, open_source
from openmimo.data.tokenizer import Tokenizer, utf8_length

FORMAT_VERSION = 2
BATCH_CHARACTERS = 500_000  # tokenized together, on all cores


@dataclass(frozen=True)
class TokenStore:
    """One split of one source.

    Attributes:
        token_ids: uint16 or uint32 [N], memory-mapped.
        offsets: int64 [documents + 1], memory-mapped.
        text_bytes: UTF-8 bytes of the documents.
        content: SHA-256 of the ids. Equal data in different folders has equal content.
    """

    token_ids: np.ndarray
    offsets: np.ndarray
    text_bytes: int
    content: str


def open_store(config: SourceConfig, tokenizer: Tokenizer, *, validation_fraction: float) -> dict[Split, TokenStore]:
    """Open both splits of a text source. The source is tokenized first if no store exists.

    With several processes, one must call this before the others.

    Raises:
        DataError: The source cannot be read or is empty.
    """
    folder = cache_folder() / "tokens" / f"{config.name}-{_key(config, tokenizer, validation_fraction)}"
    if not folder.exists():
        remove_unfinished(folder.parent)
        with writing_to_cache(), new_folder_atomic(folder) as unfinished:
            _write(unfinished, config, tokenizer, validation_fraction)
    description = read_json(folder / "store.json")
    return {split: _read_split(folder, split, description) for split in get_args(Split)}


def _key(config: SourceConfig, tokenizer: Tokenizer, validation_fraction: float) -> str:
    """Return a digest of everything that the ids depend on (not the weight)."""
    source, options = open_source(config)
    assert isinstance(source, TextSource)
    parts = {
        "format": FORMAT_VERSION,
        "source": config.name,
        "options": to_dict(options),
        "texts": source.fingerprint(options),
        "max_megabytes": config.max_megabytes,
        "tokenizer": tokenizer.fingerprint,
        "validation_fraction": validation_fraction,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class _SplitWriter:
    def __init__(self, folder: Path, split: Split, dtype: type, end_of_text_id: int):
        self._dtype, self._end_of_text_id = dtype, end_of_text_id
        self._tokens = open(folder / f"{split}.bin", "wb")  # noqa: SIM115 - closed by `close`
        self._offsets = open(folder / f"{split}_offsets.bin", "wb")  # noqa: SIM115 - closed by `close`
        self._digest = hashlib.sha256()
        self._num_tokens = self._num_documents = self._text_bytes = 0
        self._offsets.write(np.int64(0).tobytes())

    def add(self, piece: Piece, ids: list[int]) -> None:
        if piece.ends_document:
            ids = [*ids, self._end_of_text_id]
        self._tokens.write(np.array(ids, dtype=self._dtype).tobytes())
        self._digest.update(np.array(ids, dtype="<u4").tobytes())
        self._num_tokens += len(ids)
        self._text_bytes += utf8_length(piece.text)
        if piece.ends_document:
            self._num_documents += 1
            self._offsets.write(np.int64(self._num_tokens).tobytes())

    def description(self) -> dict[str, int | str]:
        return {
            "tokens": self._num_tokens,
            "documents": self._num_documents,
            "text_bytes": self._text_bytes,
            "content": self._digest.hexdigest(),
        }

    def close(self) -> None:
        self._tokens.close()
        self._offsets.close()


def _write(folder: Path, config: SourceConfig, tokenizer: Tokenizer, validation_fraction: float) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    writers = {split: _SplitWriter(folder, split, dtype, tokenizer.end_of_text_id) for split in get_args(Split)}
    try:
        for pieces in _batches(_with_progress(config, divided_documents(config, validation_fraction))):
            for piece, ids in zip(pieces, tokenizer.encode_batch([piece.text for piece in pieces]), strict=True):
                writers[piece.split].add(piece, ids)
    finally:
        for writer in writers.values():
            writer.close()
    splits = {split: writer.description() for split, writer in writers.items()}
    if not any(entry["tokens"] for entry in splits.values()):
        raise DataError(f"{config.options.get('path', f'Source {config.name!r}')} contains no text.")
    description = {"source": to_dict(config), "dtype": np.dtype(dtype).name, "splits": splits}
    (folder / "store.json").write_text(json.dumps(description, indent=2) + "\n")


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into lists of about `BATCH_CHARACTERS`."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _with_progress(config: SourceConfig, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Yield the pieces of a source, with a progress bar (text read, rate, time left)."""
    columns = [
        rich.progress.TextColumn("tokenizing {task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    ]
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(config.name, total=config.max_megabytes * 1e6 or None)
        for piece in pieces:
            yield piece
            progress.advance(task, utf8_length(piece.text))


def _read_split(folder: Path, split: Split, description: dict) -> TokenStore:
    entry = description["splits"][split]
    return TokenStore(
        token_ids=_mapped(folder / f"{split}.bin", np.dtype(description["dtype"]), entry["tokens"]),
        offsets=_mapped(folder / f"{split}_offsets.bin", np.dtype(np.int64), entry["documents"] + 1),
        text_bytes=entry["text_bytes"],
        content=entry["content"],
    )


def _mapped(file: Path, dtype: np.dtype, length: int) -> np.ndarray:
    if not file.is_file() or file.stat().st_size != length * dtype.itemsize:
        raise DataError(
            f"{file} is damaged: it should contain {length} numbers. Delete {file.parent} to tokenize again."
        )
    return np.memmap(file, dtype=dtype, mode="r") if length else np.empty(0, dtype)


@contextlib.contextmanager
def writing_to_cache() -> Iterator[None]:
    """Convert an OSError in the cache folder into a DataError that explains how to move the cache."""
    try:
        yield
    except OSError as error:
        folder = os.path.realpath(cache_folder())
        if not os.path.realpath(error.filename or "").startswith(folder):
            raise
        raise DataError(
            f"the cache {folder} cannot be written: {error.strerror} ({error.filename}). Set the environment "
            "variable OPENMIMO_CACHE to a writable folder with free space."
        ) from error
