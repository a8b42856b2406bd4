"""Reads Parquet files a few megabytes at a time, as values of one column or as rows of JSON values."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from pyarrow import types

from openmimo.core.errors import DataError

SUFFIXES = (".parquet",)
ROWS_AT_ONCE = 1024
BYTES_AT_ONCE = 4_000_000


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of these columns (None: of all that have JSON values) in batches.

    Raises:
        DataError: The file is damaged, or has not exactly one text column of each name.
    """
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
            schema = table.schema_arrow
            for column in columns or ():
                _check_column(schema, path, column)
            chosen = _columns_of_json(schema, path) if columns is None else columns
            for group in range(table.num_row_groups):
                at_once = _rows_at_once(table.metadata.row_group(group), chosen)
                for batch in table.iter_batches(at_once, row_groups=[group], columns=chosen):
                    yield batch
                    row += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read after row {row}: {str(error).strip()}. Write the file again, or remove it."
        ) from error


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and row, object) for each row. Null values are left out, as absent keys.

    Columns of types that JSON has not (bytes, dates) are left out with a warning.

    Raises:
        DataError: The file is damaged, or a number is not finite.
    """
    number = 0
    for batch in read_batches(path):
        for position in range(batch.num_rows):
            number += 1
            where = f"{path}, row {number}"
            row = {name: batch.column(name)[position].as_py() for name in batch.schema.names}
            yield where, _without_nulls(row, where)


def _without_nulls(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item, where) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: {value} is not a JSON number. Write null, or remove the row.")
    return value


def _columns_of_json(schema: pyarrow.Schema, path: Path) -> list[str]:
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{path} has several columns of one name: {', '.join(schema.names)}. Rename them.")
    chosen = [field.name for field in schema if _is_json(field.type)]
    if len(chosen) < len(schema):
        omitted = ", ".join(f"{field.name} ({field.type})" for field in schema if field.name not in chosen)
        warnings.warn(f"{path}: columns of types that JSON has not are left out: {omitted}.", stacklevel=2)
    return chosen


def _is_json(kind: pyarrow.DataType) -> bool:
    if types.is_struct(kind):
        return all(_is_json(kind.field(number).type) for number in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _is_json(kind.value_type)
    checks = (types.is_boolean, types.is_integer, types.is_floating, types.is_null)
    return _is_text(kind) or any(check(kind) for check in checks)


def _is_text(kind: pyarrow.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _rows_at_once(group: pyarrow.parquet.RowGroupMetaData, columns: list[str]) -> int:
    """Return the number of rows whose uncompressed columns have about `BYTES_AT_ONCE` bytes."""
    chunks = (group.column(number) for number in range(group.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE * group.num_rows // max(size, 1)))


def _check_column(schema: pyarrow.Schema, path: Path, column: str) -> None:
    if schema.names.count(column) != 1:
        raise DataError(
            f"{path} has {'several columns' if column in schema.names else 'no column'} {column!r}; it has "
            f"{', '.join(schema.names)}. Set option 'column' (--data-field, --text-field) to one of them."
        )
    kind = schema.field(column).type
    if not _is_text(kind.value_type if types.is_dictionary(kind) else kind):
        raise DataError(f"{path}: column {column!r} has type {kind}, not text. Set option 'column' to a text column.")
