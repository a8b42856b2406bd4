"""Objects (conversations, problems) from JSON Lines or Parquet files, with errors that name file and line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openmimo.core.errors import DataError
from openmimo.data import json_lines
from openmimo.data.source import find_files, has_suffix

_PARQUET = (".parquet",)


def object_files(path: str) -> list[Path]:
    """Return `path` if it is a file, else the files of objects in that folder, which are all of one kind.

    Raises:
        DataError: There is none, or there are JSON Lines and Parquet files.
    """
    files = find_files(path, json_lines.SUFFIXES + _PARQUET)
    parquet = [file for file in files if has_suffix(file, _PARQUET)]
    if 0 < len(parquet) < len(files):
        raise DataError(f"{path} contains JSON Lines and Parquet files. Give a folder of one kind, or one file.")
    return files


def read_objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, object) for each line of JSON Lines, or each row of Parquet. Raises DataError."""
    for file in object_files(path):
        if has_suffix(file, _PARQUET):
            from openmimo.data.parquet_files import read_rows  # slow to import

            yield from read_rows(file)
        else:
            yield from json_lines.read_file(file)
