"""Documents as token ids on disk: tokenised once, then read through memory maps by every run with the same settings.

A store is a folder with, for each split, `<split>.bin` (ids of all documents one after another, each ended by the
end-of-text token; uint16, or uint32 for a vocabulary over 65,536) and `<split>_offsets.npy` (int64 [documents + 1],
where each begins), and `store.json`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import rich.console
import rich.progress

from openmimo.core.config import read_json, to_dict
from openmimo.core.errors import DataError
from openmimo.core.files import new_folder_atomic, remove_unfinished
from openmimo.data.cache import cache_folder, writing_to_cache
from openmimo.data.config import SourceConfig
from openmimo.data.source import Split, TextSource, open_source, read_documents, split_of
from openmimo.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
BATCH_CHARACTERS = 4_000_000  # tokenised at once, on all cores


@dataclass(frozen=True)
class TokenStore:
    """One split of one source.

    token_ids: uint16 or uint32 [N], memory-mapped. offsets: int64 [documents + 1]. text_bytes: UTF-8 bytes of the
    documents. content: SHA-256 of the ids, so equal for equal data wherever it lies.
    """

    token_ids: np.ndarray
    offsets: np.ndarray
    text_bytes: int
    content: str


def open_store(config: SourceConfig, tokenizer: Tokenizer, *, validation_fraction: float) -> dict[Split, TokenStore]:
    """Both splits of a text source, tokenised now if no earlier run has.

    With several processes, let one call this first: the others then find the store. Raises DataError if the source
    cannot be read or is empty.
    """
    folder = cache_folder() / "tokens" / f"{config.name}-{_key(config, tokenizer, validation_fraction)}"
    if not folder.exists():
        remove_unfinished(folder.parent)
        with writing_to_cache(), new_folder_atomic(folder) as unfinished:
            _write(unfinished, config, tokenizer, validation_fraction)
    description = read_json(folder / "store.json")
    return {split: _read_split(folder, split, description) for split in get_args(Split)}


def _key(config: SourceConfig, tokenizer: Tokenizer, validation_fraction: float) -> str:
    """Names everything that the ids depend on; the weight does not count."""
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
    def __init__(self, folder: Path, split: Split, dtype: type):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._file = open(folder / f"{split}.bin", "wb")  # noqa: SIM115 - closed by `finish`
        self._digest = hashlib.sha256()
        self._offsets = [0]
        self._text_bytes = 0

    def add(self, text: str, ids: list[int]) -> None:
        data = np.array(ids, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(np.array(ids, dtype="<u4").tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._text_bytes += len(text.encode())

    def finish(self) -> dict[str, int | str]:
        self._file.close()
        np.save(self._folder / f"{self._split}_offsets.npy", np.array(self._offsets, dtype=np.int64))
        return {"tokens": self._offsets[-1], "text_bytes": self._text_bytes, "content": self._digest.hexdigest()}


def _write(folder: Path, config: SourceConfig, tokenizer: Tokenizer, validation_fraction: float) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    writers = {split: _SplitWriter(folder, split, dtype) for split in get_args(Split)}
    for texts in _batches(_with_progress(config)):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            writers[split_of(text, validation_fraction)].add(text, [*ids, tokenizer.end_of_text_id])
    splits = {split: writer.finish() for split, writer in writers.items()}
    if not any(entry["tokens"] for entry in splits.values()):
        raise DataError(f"Source {config.name!r} with options {config.options} holds no text.")
    description = {"source": to_dict(config), "dtype": np.dtype(dtype).name, "splits": splits}
    (folder / "store.json").write_text(json.dumps(description, indent=2) + "\n")


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts of some `BATCH_CHARACTERS` together."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _with_progress(config: SourceConfig) -> Iterator[str]:
    """The documents of a source, with a line that shows how much text has been read, how fast, and the time left."""
    columns = [
        rich.progress.TextColumn("tokenising {task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    ]
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(config.name, total=config.max_megabytes * 1e6 or None)
        for text in read_documents(config):
            yield text
            progress.advance(task, len(text.encode()))


def _read_split(folder: Path, split: Split, description: dict) -> TokenStore:
    entry = description["splits"][split]
    file, dtype = folder / f"{split}.bin", np.dtype(description["dtype"])
    if file.stat().st_size != entry["tokens"] * dtype.itemsize:
        raise DataError(f"{file} is damaged: it should hold {entry['tokens']} tokens. Delete {folder} to make it anew.")
    return TokenStore(
        token_ids=np.memmap(file, dtype=dtype, mode="r") if entry["tokens"] else np.empty(0, dtype),
        offsets=np.load(folder / f"{split}_offsets.npy"),
        text_bytes=entry["text_bytes"],
        content=entry["content"],
    )
