"""Documents in JSON Lines: one object a line, its text in one field."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from openmimo.core.errors import DataError
from openmimo.data.json_lines import SUFFIXES, read_objects
from openmimo.data.source import TextSource, find_files, fingerprint_files


@dataclass(frozen=True)
class Options:
    """path: a file, or a folder of .jsonl files. field: the key that holds the text."""

    path: str
    field: str = "text"


def documents(options: Options) -> Iterator[str]:
    """One document a line; empty texts are left out. A bad line is a DataError with file and line."""
    for where, row in read_objects(options.path):
        if options.field not in row:
            raise DataError(
                f"{where}: there is no {options.field!r} (found: {', '.join(row) or 'nothing'}). Name the key of the "
                "text by option 'field'."
            )
        text = row.pop(options.field)
        if not isinstance(text, str):
            raise DataError(f"{where}: {options.field!r} is {json.dumps(text)[:40]}, not text. Delete the line.")
        yield text


def fingerprint(options: Options) -> str:
    """Of the files' names, sizes and times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


PLUGIN = TextSource(
    describe="JSON Lines, one document a line (options: path, field)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
