"""Objects from JSON Lines files, with errors that name file and line."""

import json
from collections.abc import Iterator
from typing import Any

from openmimo.core.errors import DataError
from openmimo.data.source import find_files

SUFFIXES = (".jsonl",)


def read_objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the object) of each line of a file, or of the .jsonl files of a folder.

    Empty lines are skipped. A line that is not a JSON object is a DataError.
    """
    for file in find_files(path, SUFFIXES):
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, _parse(line, where)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}). Mend or delete the line.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is needed, not a {type(value).__name__}.")
    return value
