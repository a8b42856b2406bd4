"""What a data source is: one file in `openmimo/data/sources` that exports `PLUGIN`, a TextSource or a SyntheticSource.

A text source gives documents, which are tokenised once and cut into rows (`store`, `packing`). A synthetic source makes
whole rows of token ids from a random generator. Either says by a frozen dataclass which options it takes.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openmimo.core.config import from_dict
from openmimo.core.errors import DataError
from openmimo.core.registry import Registry
from openmimo.data.config import SourceConfig
from openmimo.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]


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
    """row_maker(options, tokenizer, sequence_length): the function that makes a row from a random generator, and from
    nothing else. Raises DataError if such rows cannot be made.
    """

    row_maker: Callable[[Any, Tokenizer, int], RowMaker]


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
            bytes_left -= len(text.encode())
            yield text


def training_documents(config: SourceConfig, validation_fraction: float) -> Iterator[str]:
    """The documents that a mixture with this `validation_fraction` trains on: what a tokenizer may be trained on."""
    return (text for text in read_documents(config) if split_of(text, validation_fraction) == "train")


def split_of(text: str, validation_fraction: float) -> Split:
    """The side a document is on, by a hash of its text: the same in every run, and for every copy of it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_fraction * 2.0**64 else "train"


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """`path` itself if it is a file, else the files under that folder with one of `suffixes`, sorted by path.

    Raises DataError if there is none.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"{root} does not exist. Give the source an existing file or folder as its option 'path'.")
    if root.is_file():
        return [root]
    found = sorted(file for file in root.rglob("*") if file.suffix in suffixes and file.is_file())
    if not found:
        raise DataError(f"{root} holds no file that ends in {', '.join(suffixes)}.")
    return found


def fingerprint_files(files: list[Path]) -> str:
    """Changes when a file is added, removed, renamed, rewritten or touched."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_text(file: Path) -> str:
    """A UTF-8 text file. Raises DataError, naming the file, if it is something else."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start}). Convert it, or take it out of the folder."
        ) from error
