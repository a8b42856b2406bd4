"""Documents from Parquet files: one document per row, with the text in one column."""

from collections.abc import Iterator
from dataclasses import dataclass

from openmimo.data.parquet_files import SUFFIXES, read_batches
from openmimo.data.source import TextSource, find_files, fingerprint_files


@dataclass(frozen=True)
class Options:
    """Options of source `parquet`.

    Attributes:
        path: A file, or a folder of .parquet files.
        column: The column of the text.
    """

    path: str
    column: str = "text"


def documents(options: Options) -> Iterator[str]:
    """Yield one document per row, without null rows. Reads a few megabytes at a time."""
    for path in find_files(options.path, SUFFIXES):
        for batch in read_batches(path, [options.column]):
            for value in batch.column(0):
                if (text := value.as_py()) is not None:
                    yield text


def fingerprint(options: Options) -> str:
    """Return a digest of the files' names, sizes and modification times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


PLUGIN = TextSource(
    describe="Parquet files, one document per row (options: path, column)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
