"""Documents in Parquet files: one row a document, its text in one column."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from openmimo.core.errors import DataError
from openmimo.data.source import TextSource, find_files, fingerprint_files

SUFFIXES = (".parquet",)
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Options:
    """path: a file, or a folder of .parquet files. column: the column that holds the text."""

    path: str
    column: str = "text"


def documents(options: Options) -> Iterator[str]:
    """One document a row; rows without text are left out."""
    for path in find_files(options.path, SUFFIXES):
        table = _open(path, options.column)
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[options.column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _open(path: Path, column: str) -> pyarrow.parquet.ParquetFile:
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    names = table.schema_arrow.names
    if column not in names:
        raise DataError(f"{path} has no column {column!r}; it has {', '.join(names)}. Name one by option 'column'.")
    kind = table.schema_arrow.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column {column!r} holds {kind}, not text. Name a column of text by option 'column'.")
    return table


def fingerprint(options: Options) -> str:
    """The files' names, sizes and times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


PLUGIN = TextSource(
    describe="Parquet files, one document a row (options: path, column)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
