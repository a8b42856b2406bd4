"""Reads files that may be compressed with gzip or zstd. Their first bytes, not their names, state the compression.

A small compressed file can expand to any size, so the documents of compressed files have a maximum size.
"""

import contextlib
import gzip
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from openmimo.core.errors import DataError
from openmimo.data.source import GZIP_START, ZSTD_START, reading

MAX_DOCUMENT_BYTES = 1 << 28


def with_packed(*suffixes: str) -> tuple[str, ...]:
    """Return the suffixes, and those of their compressed files."""
    return suffixes + tuple(suffix + packing for suffix in suffixes for packing in (".gz", ".zst"))


def read_lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file. Raises DataError if it is damaged, or a compressed line is too long."""
    with _opened(file) as (opened, limit):
        yield from iter(partial(_line, file, opened, limit), b"")  # keeps no reference to a line


def read_whole(file: Path) -> bytes:
    """Return the content of a file. Raises DataError if it is damaged, or compressed and too long."""
    with _opened(file) as (opened, limit):
        return _within(file, opened.read(limit + 1 if limit else -1), limit)


def _line(file: Path, opened: BinaryIO, limit: int) -> bytes:
    return _within(file, opened.readline(limit + 1 if limit else -1), limit)


def _within(file: Path, content: bytes, limit: int) -> bytes:
    if limit and len(content) > limit:
        raise DataError(
            f"{file} contains a document of more than {limit >> 20} MiB. Check it, and unpack the file to read it."
        )
    return content


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file for reading of its unpacked bytes. Yields it with the maximum size of a document (0: none)."""
    with reading(file), contextlib.ExitStack() as stack:
        opened: BinaryIO = stack.enter_context(open(file, "rb"))
        start = opened.read(4)
        opened.seek(0)
        if start.startswith(GZIP_START):
            try:
                yield cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=opened))), MAX_DOCUMENT_BYTES
            except gzip.BadGzipFile as error:
                raise DataError(f"{file} is compressed, as its first bytes say, but damaged: {error}.") from error
        elif start == ZSTD_START:
            import pyarrow  # slow to import

            unpacked = pyarrow.CompressedInputStream(opened, "zstd")
            yield stack.enter_context(io.BufferedReader(unpacked)), MAX_DOCUMENT_BYTES
        elif start and file.suffix.lower() in (".gz", ".zst"):
            raise DataError(f"{file} is not compressed, although its name says so. Rename it without {file.suffix}.")
        else:
            yield opened, 0
