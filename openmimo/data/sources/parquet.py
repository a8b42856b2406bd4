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
BYTES_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Options:
    """path: a file, or a folder of .parquet files. column: the column that holds the text."""

    path: str
    column: str = "text"


def documents(options: Options) -> Iterator[str]:
    """One document a row; rows without text are left out. Some megabytes are in memory at once."""
    for path in find_files(options.path, SUFFIXES):
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
                _check_column(table.schema_arrow, path, options.column)
                for group in range(table.num_row_groups):
                    at_once = _rows_at_once(table.metadata.row_group(group), options.column)
                    for batch in table.iter_batches(at_once, row_groups=[group], columns=[options.column]):
                        for value in batch.column(0):
                            row += 1
                            if (text := value.as_py()) is not None:
                                yield text
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} cannot be read after row {row}: {str(error).strip()}. Write the file again, or take it away."
            ) from error


def _rows_at_once(group: pyarrow.parquet.RowGroupMetaData, column: str) -> int:
    """The number of rows whose text, uncompressed, takes about `BYTES_AT_ONCE`."""
    chunks = (group.column(number) for number in range(group.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE * group.num_rows // max(size, 1)))


def _check_column(schema: pyarrow.Schema, path: Path, column: str) -> None:
    if schema.names.count(column) != 1:
        raise DataError(
            f"{path} has {'several columns' if column in schema.names else 'no column'} {column!r}; it has "
            f"{', '.join(schema.names)}. Name one by option 'column'."
        )
    kind = schema.field(column).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(check(values) for check in is_text):
        raise DataError(f"{path}: column {column!r} holds {kind}, not text. Name a column of text by option 'column'.")


def fingerprint(options: Options) -> str:
    """Of the files' names, sizes and times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


PLUGIN = TextSource(
    describe="Parquet files, one document a row (options: path, column)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
