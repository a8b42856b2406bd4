"""The interface of data sources. Each file in `openmimo/data/sources` exports a TextSource or a SyntheticSource as
`PLUGIN`.

A text source yields documents, which are tokenized once and cut into rows (`store`, `mixing`). A synthetic source
generates whole rows of token ids from a random generator. Each source declares its options in a frozen dataclass.
"""

import contextlib
import hashlib
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from openmimo.core.config import from_dict
from openmimo.core.errors import DataError
from openmimo.core.registry import Registry
from openmimo.data.config import SourceConfig
from openmimo.data.tokenizer import Tokenizer, blocks, cut_text, utf8_length

Split = Literal["train", "validation"]

_PASSAGE_CHARACTERS = 1024
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
GZIP_START, ZSTD_START = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
UNPACKED_STARTS = (GZIP_START, ZSTD_START)
_PACKED_STARTS = (*UNPACKED_STARTS, b"BZh", b"\xfd7zXZ\x00", b"\x04\x22\x4d\x18", b"PK\x03\x04")


@dataclass(frozen=True)
class Row:
    """One training row of S tokens.

    Attributes:
        token_ids: int32 [S].
        document_lengths: The lengths of its document pieces in order; they add up to S.
        loss_mask: bool [S], True where the token is a label of the loss; None: everywhere.
    """

    token_ids: np.ndarray
    document_lengths: tuple[int, ...]
    loss_mask: np.ndarray | None = None


RowMaker = Callable[[np.random.Generator], Row]


class RowMakers(NamedTuple):
    """The row makers of a synthetic source.

    Attributes:
        by_split: The maker of each split. No example occurs in both splits; a split without examples is absent.
        content: Identifies the data behind the rows, independent of its location; "" if the options determine it.
    """

    by_split: Mapping[Split, RowMaker]
    content: str = ""


@dataclass(frozen=True)
class FileContent:
    """A file or folder of data, and the SHA-256 of its content, which is independent of its location."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """A data source.

    Attributes:
        describe: One line for `--help`.
        options: The frozen dataclass of its settings.
    """

    describe: str
    options: type


@dataclass(frozen=True)
class TextSource(Source):
    """A source of texts.

    Attributes:
        documents: `documents(options)` yields the texts, always in the same order. Raises DataError.
        fingerprint: `fingerprint(options)` is cheap and changes when the texts may have changed. Raises DataError.
    """

    documents: Callable[[Any], Iterator[str]]
    fingerprint: Callable[[Any], str]


@dataclass(frozen=True)
class SyntheticSource(Source):
    """A source of generated rows.

    Attributes:
        row_makers: `row_makers(options, tokenizer, sequence_length, validation_fraction)` returns, for each split, a
            function that makes a row from a random generator alone. A hash of their content assigns examples to splits.
            Raises DataError if such rows cannot be made.
    """

    row_makers: Callable[[Any, Tokenizer, int, float], RowMakers]


SOURCES: Registry[Source] = Registry("openmimo.data.sources", Source)


def open_source(config: SourceConfig) -> tuple[Source, Any]:
    """Return the plug-in of `config` and its checked options. Raises ConfigError for an unknown name or option."""
    source = SOURCES.get(config.name)
    return source, from_dict(source.options, config.options, where=f"options of source {config.name!r}")


def read_documents(config: SourceConfig) -> Iterator[str]:
    """Yield the non-empty documents of a text source, up to `config.max_megabytes` of text."""
    source, options = open_source(config)
    if not isinstance(source, TextSource):
        raise DataError(f"Source {config.name!r} generates token ids and has no documents; use a text source.")
    bytes_left = config.max_megabytes * 1e6 or float("inf")
    for text in source.documents(options):
        if bytes_left <= 0:
            return
        if text:
            bytes_left -= utf8_length(text)
            yield text


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        text: Its text.
        split: Its split.
        ends_document: Whether the next piece belongs to another document.
    """

    text: str
    split: Split
    ends_document: bool


def divided_documents(config: SourceConfig, validation_fraction: float) -> Iterator[Piece]:
    """Yield the documents of a text source in pieces of bounded length, each with its split.

    A hash of the text assigns whole documents to splits. If a split would be empty (one long document, a few books),
    documents are cut at line ends and passages are assigned instead; at least one is held out. A run of passages of one
    split is then a document.
    """
    most = _highest_hash_of_passages(config, validation_fraction)
    for text in read_documents(config):
        if most is None:
            split = split_of(text, validation_fraction)
            passages = [(passage, split) for passage in cut_text(text)]
        else:
            passages = [(passage, _split(_hash(passage) <= most)) for passage in cut_text(text, _PASSAGE_CHARACTERS)]
        following: list[Split | None] = [*(split for _, split in passages[1:]), None]
        for (passage, split), after in zip(passages, following, strict=True):
            yield Piece(passage, split, ends_document=after != split)


def training_documents(config: SourceConfig, validation_fraction: float) -> Iterator[str]:
    """Yield the training texts of a source at this `validation_fraction`, in pieces, for tokenizer training."""
    return (piece.text for piece in divided_documents(config, validation_fraction) if piece.split == "train")


def split_of(text: str, validation_fraction: float) -> Split:
    """Return the split of a document by the hash of its text. It is the same in every run and for every copy."""
    return _split(_hash(text) < validation_fraction * 2.0**64)


def split_of_bytes(content: bytes, validation_fraction: float) -> Split:
    """Return the split of an example that is not text, as `split_of` does for text."""
    return _split(
        int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < validation_fraction * 2.0**64
    )


def _split(is_held_out: bool) -> Split:
    return "validation" if is_held_out else "train"


def _hash(text: str) -> int:
    """Return 64 bits of a hash, without a copy of the whole text."""
    digest = hashlib.blake2b(digest_size=8)
    for block in blocks(text):
        digest.update(block.encode())
    return int.from_bytes(digest.digest(), "big")


def _highest_hash_of_passages(config: SourceConfig, validation_fraction: float) -> int | None:
    """Return the highest hash of a held-out passage if passages are assigned to splits; None if documents are."""
    if validation_fraction == 0.0:
        return None
    splits = set()
    for text in read_documents(config):
        splits.add(split_of(text, validation_fraction))
        if len(splits) == 2:
            return None
    passages = (passage for text in read_documents(config) for passage in cut_text(text, _PASSAGE_CHARACTERS))
    lowest = min(map(_hash, passages), default=0)
    return max(lowest, math.ceil(validation_fraction * 2.0**64) - 1)


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return `path` if it is a file, else the files below that folder with one of `suffixes`, sorted by path.

    Suffixes such as ".txt.gz" state that the caller reads gzip and zstd files, with `openmimo.data.compressed`. All
    other compressed files are refused; in a folder, they are skipped with a warning.

    Raises:
        DataError: There is no such file, or `path` is compressed.
    """
    if not path:
        raise DataError("The option 'path' of the source is empty. Set it to a file or a folder.")
    try:
        root = Path(path).expanduser()
        is_file, is_folder, exists = root.is_file(), root.is_dir(), root.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path!r} cannot be opened ({error}). Set 'path' to an existing file or folder.") from error
    if not exists:
        raise DataError(f"{root} does not exist. Set the option 'path' of the source to an existing file or folder.")
    unpacks = any(suffix.endswith(".gz") for suffix in suffixes)
    if is_file:
        _refuse_compressed(root, unpacks)
        return [root]
    if not is_folder:
        raise DataError(f"{root} is neither a file nor a folder. Set the option 'path' to one.")
    files = sorted(file for file in root.rglob("*") if file.is_file())
    found = [file for file in files if has_suffix(file, suffixes)]
    packed = [file for file in files if not has_suffix(file, suffixes) and _without_packing(file) in suffixes]
    if packed and not found:
        raise DataError(f"{root} contains only compressed files, such as {packed[0].name}. Unpack them.")
    if not found:
        plain = [suffix for suffix in suffixes if not suffix.endswith(PACKED_SUFFIXES)]
        also = " (also .gz, .zst)" if unpacks else ""
        raise DataError(f"{root} contains no file with the suffix {' or '.join(plain)}{also}.")
    if packed:
        warnings.warn(
            f"{root}: {len(packed)} compressed files, such as {packed[0].name}, are skipped. Unpack them.",
            stacklevel=2,
        )
    for file in found:
        _refuse_compressed(file, unpacks)
    return found


def has_suffix(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Return whether the name ends with one of `suffixes` (lower case), which may have two parts, such as ".txt.gz"."""
    return file.name.lower().endswith(suffixes)


def _without_packing(file: Path) -> str:
    """Return the suffix of a compressed file without its compression suffix; "" for an uncompressed file."""
    return Path(file.stem).suffix.lower() if file.suffix.lower() in PACKED_SUFFIXES else ""


def _refuse_compressed(file: Path, unpacks: bool) -> None:
    with reading(file), open(file, "rb") as opened:
        start = opened.read(6)
    if any(start.startswith(magic) for magic in _PACKED_STARTS) and not (unpacks and start.startswith(UNPACKED_STARTS)):
        command = f" (gunzip -k {file})" if file.suffix == ".gz" else ""
        raise DataError(f"{file} is compressed. Unpack it{command}, and give the unpacked file.")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Convert an error of the block's input, unpacking included, into a DataError that names the file."""
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise DataError(f"{file} is a damaged gzip file ({error}). Compress or download it again.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error


def fingerprint_files(files: list[Path]) -> str:
    """Return a digest that changes if a file is added, removed, renamed or written, even with its old size and time."""
    digest = hashlib.sha256()
    for file in files:
        with reading(file):
            status = file.stat()
        digest.update(os.fsencode(file.resolve()))
        digest.update(f" {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def read_text(file: Path) -> str:
    """Read a UTF-8 text file. Raises DataError, with the file name, if it is not one."""
    with reading(file):
        return decoded(file.read_bytes(), file)


def decoded(content: bytes, file: Path) -> str:
    """Return the text of a file, with line ends of one character. Raises DataError if it is not UTF-8 text."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start}). Convert it, or remove it from the folder."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
