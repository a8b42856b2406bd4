"""Documents from Parquet files: one document per row, with the text in one column."""

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
                f"{path} cannot be read after row {row}: {str(error).strip()}. Write the file again, or remove it."
            ) from error


def _rows_at_once(group: pyarrow.parquet.RowGroupMetaData, column: str) -> int:
    """Return the number of rows whose uncompressed text has about `BYTES_AT_ONCE` bytes."""
    chunks = (group.column(number) for number in range(group.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE * group.num_rows // max(size, 1)))


def _check_column(schema: pyarrow.Schema, path: Path, column: str) -> None:
    if schema.names.count(column) != 1:
        raise DataError(
            f"{path} has {'several columns' if column in schema.names else 'no column'} {column!r}; it has "
            f"{', '.join(schema.names)}. Set option 'column' to one of them."
        )
    kind = schema.field(column).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(check(values) for check in is_text):
        raise DataError(f"{path}: column {column!r} has type {kind}, not text. Set option 'column' to a text column.")


def fingerprint(options: Options) -> str:
    """Return a digest of the files' names, sizes and modification times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


PLUGIN = TextSource(
    describe="Parquet files, one document per row (options: path, column)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
