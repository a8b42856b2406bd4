"""What a data source is: one file in `openmimo/data/sources` that exports `PLUGIN`, a TextSource or a SyntheticSource.

A text source gives documents, which are tokenized once and cut into rows (`store`, `packing`). A synthetic source makes
whole rows of token ids from a random generator. Either says by a frozen dataclass which options it takes.
"""

import contextlib
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from openmimo.core.config import from_dict
from openmimo.core.errors import DataError
from openmimo.core.registry import Registry
from openmimo.data.config import SourceConfig
from openmimo.data.pieces import blocks, cut_text, utf8_length
from openmimo.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]

_PASSAGE_CHARACTERS = 1024
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
_PACKED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\x03\x04")


@dataclass(frozen=True)
class Row:
    """One row of a batch, of S tokens.

    token_ids: int32 [S]. document_lengths: the lengths of its pieces in order; they add up to S. loss_mask: bool [S],
    True where the token is worth predicting from those before it; None means everywhere.
    """

    token_ids: np.ndarray
    document_lengths: tuple[int, ...]
    loss_mask: np.ndarray | None = None


RowMaker = Callable[[np.random.Generator], Row]


class RowMakers(NamedTuple):
    """How a synthetic source makes rows.

    by_split: the maker of each side. No example of one side occurs on the other; a side without examples is missing.
    content: names the data that rows are made from, equal for equal data wherever it lies; "" where options say all.
    """

    by_split: Mapping[Split, RowMaker]
    content: str = ""


@dataclass(frozen=True)
class FileContent:
    """A file or folder of data, and the SHA-256 of what was read from it, which does not depend on where it lies."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """describe: one line for people. options: the frozen dataclass of its settings."""

    describe: str
    options: type


@dataclass(frozen=True)
class TextSource(Source):
    """documents(options): the texts, always in the same order. fingerprint(options): changes when the texts may have
    changed, and is cheap. Both raise DataError if the texts are not to be had.
    """

    documents: Callable[[Any], Iterator[str]]
    fingerprint: Callable[[Any], str]


@dataclass(frozen=True)
class SyntheticSource(Source):
    """row_makers(options, tokenizer, sequence_length, validation_fraction): for each side, the function that makes a
    row from a random generator, and from nothing else. `validation_fraction` of the examples, chosen by a hash of their
    content, are held out. Raises DataError if such rows cannot be made.
    """

    row_makers: Callable[[Any, Tokenizer, int, float], RowMakers]


SOURCES: Registry[Source] = Registry("openmimo.data.sources", Source)


def open_source(config: SourceConfig) -> tuple[Source, Any]:
    """The plug-in that `config` names and its checked options. Raises ConfigError for an unknown name or option."""
    source = SOURCES.get(config.name)
    return source, from_dict(source.options, config.options, where=f"options of source {config.name!r}")


def read_documents(config: SourceConfig) -> Iterator[str]:
    """The documents of a text source, empty ones left out, until `config.max_megabytes` of text have been read."""
    source, options = open_source(config)
    if not isinstance(source, TextSource):
        raise DataError(f"Source {config.name!r} makes token ids, not texts, so it has no documents to read.")
    bytes_left = config.max_megabytes * 1e6 or float("inf")
    for text in source.documents(options):
        if bytes_left <= 0:
            return
        if text:
            bytes_left -= utf8_length(text)
            yield text


@dataclass(frozen=True)
class Piece:
    """A part of a document. split: its side. ends_document: whether the next piece belongs to another document."""

    text: str
    split: Split
    ends_document: bool


def divided_documents(config: SourceConfig, validation_fraction: float) -> Iterator[Piece]:
    """The documents of a text source in pieces of bounded length, each on its side of the split.

    Documents are divided whole, by a hash of their text. Where that leaves a side without any (one long document, a few
    books), they are cut at line ends, and the passages are divided: at least one is held out. What lies between two
    passages of the other side is a document then.
    """
    most = _highest_hash_of_passages(config, validation_fraction)
    for text in read_documents(config):
        if most is None:
            split = split_of(text, validation_fraction)
            passages = [(passage, split) for passage in cut_text(text)]
        else:
            passages = [(passage, _side(_hash(passage) <= most)) for passage in cut_text(text, _PASSAGE_CHARACTERS)]
        following = [split for _, split in passages[1:]] + [None]
        for (passage, split), after in zip(passages, following, strict=True):
            yield Piece(passage, split, ends_document=after != split)


def training_documents(config: SourceConfig, validation_fraction: float) -> Iterator[str]:
    """What a mixture with this `validation_fraction` trains on, long documents in pieces: text for a tokenizer."""
    return (piece.text for piece in divided_documents(config, validation_fraction) if piece.split == "train")


def split_of(text: str, validation_fraction: float) -> Split:
    """The side a document is on, by a hash of its text: the same in every run, and for every copy of it."""
    return _side(_hash(text) < validation_fraction * 2.0**64)


def split_of_bytes(content: bytes, validation_fraction: float) -> Split:
    """`split_of` for an example that is not text."""
    return _side(
        int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < validation_fraction * 2.0**64
    )


def _side(is_held_out: bool) -> Split:
    return "validation" if is_held_out else "train"


def _hash(text: str) -> int:
    """64 bits; of a long text without a copy of the whole."""
    digest = hashlib.blake2b(digest_size=8)
    for block in blocks(text):
        digest.update(block.encode())
    return int.from_bytes(digest.digest(), "big")


def _highest_hash_of_passages(config: SourceConfig, validation_fraction: float) -> int | None:
    """If passages are divided and not documents, the highest hash of a passage that is held out; else None."""
    if validation_fraction == 0.0:
        return None
    sides = set()
    for text in read_documents(config):
        sides.add(split_of(text, validation_fraction))
        if len(sides) == 2:
            return None
    passages = (passage for text in read_documents(config) for passage in cut_text(text, _PASSAGE_CHARACTERS))
    lowest = min(map(_hash, passages), default=0)
    return max(lowest, math.ceil(validation_fraction * 2.0**64) - 1)


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """`path` itself if it is a file, else the files under that folder with one of `suffixes`, sorted by path.

    Raises DataError if there is none, or for a compressed file. Compressed files in a folder are left out, with a
    warning that names one.
    """
    if not path:
        raise DataError("The option 'path' of the source is empty. Name a file or a folder.")
    try:
        root = Path(path).expanduser()
        is_file, is_folder, exists = root.is_file(), root.is_dir(), root.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path!r} cannot be opened ({error}). Name an existing file or folder by 'path'.") from error
    if not exists:
        raise DataError(f"{root} does not exist. Give the source an existing file or folder as its option 'path'.")
    if is_file:
        _refuse_compressed(root)
        return [root]
    if not is_folder:
        raise DataError(f"{root} is neither a file nor a folder. Name one by the option 'path'.")
    files = sorted(file for file in root.rglob("*") if file.is_file())
    found = [file for file in files if file.suffix.lower() in suffixes]
    packed = [file for file in files if _without_packing(file) in suffixes]
    if packed and not found:
        raise DataError(f"{root} holds only compressed files, such as {packed[0].name}. Unpack them.")
    if not found:
        raise DataError(f"{root} holds no file that ends in {', '.join(suffixes)}.")
    if packed:
        warnings.warn(
            f"{root}: {len(packed)} compressed files, such as {packed[0].name}, are not read. Unpack them.",
            stacklevel=2,
        )
    for file in found:
        _refuse_compressed(file)
    return found


def _without_packing(file: Path) -> str:
    """The suffix before the one of a compressed file; "" for a file that is not compressed."""
    return Path(file.stem).suffix.lower() if file.suffix.lower() in _PACKED_SUFFIXES else ""


def _refuse_compressed(file: Path) -> None:
    with reading(file), open(file, "rb") as opened:
        start = opened.read(6)
    if any(start.startswith(magic) for magic in _PACKED_STARTS):
        raise DataError(f"{file} is compressed. Unpack it, and name the unpacked file.")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns what the system says against reading a file into a DataError that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error


def fingerprint_files(files: list[Path]) -> str:
    """Changes when a file is added, removed, renamed or written to, even if its size and time are put back."""
    digest = hashlib.sha256()
    for file in files:
        with reading(file):
            status = file.stat()
        digest.update(os.fsencode(file.resolve()))
        digest.update(f" {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def read_text(file: Path) -> str:
    """A UTF-8 text file. Raises DataError, naming the file, if it is something else."""
    try:
        with reading(file):
            return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start}). Convert it, or take it out of the folder."
        ) from error
