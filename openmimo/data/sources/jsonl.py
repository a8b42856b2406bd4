"""Documents in JSON Lines: one object a line, its text in one field."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openmimo.core.errors import DataError
from openmimo.data.source import TextSource, find_files, fingerprint_files

SUFFIXES = (".jsonl",)


@dataclass(frozen=True)
class Options:
    """path: a file, or a folder of .jsonl files. field: the key that holds the text."""

    path: str
    field: str = "text"


def documents(options: Options) -> Iterator[str]:
    """One document a line; empty lines are left out. A bad line is a DataError with file and line."""
    for path in find_files(options.path, SUFFIXES):
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, options.field, path, number)


def _text_of(line: bytes, field: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, line {number}: not valid JSON ({error}). Mend or delete the line.") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        keys = ", ".join(row) if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise DataError(
            f"{path}, line {number}: no text under {field!r} (found: {keys}). Name the right key by option 'field'."
        )
    return row[field]


def fingerprint(options: Options) -> str:
    """The files' names, sizes and times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


PLUGIN = TextSource(
    describe="JSON Lines, one document a line (options: path, field)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
