"""Documents from JSON Lines: one object per line, with the text in one field."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from openmimo.core.errors import DataError
from openmimo.data.json_lines import SUFFIXES, read_file
from openmimo.data.source import TextSource, find_files, fingerprint_files


@dataclass(frozen=True)
class Options:
    """Options of source `jsonl`.

    Attributes:
        path: A file, or a folder of .jsonl, .jsonl.gz and .json.gz (or .zst) files.
        field: The key of the text.
    """

    path: str
    field: str = "text"


def documents(options: Options) -> Iterator[str]:
    """Yield one document per line. Raises DataError with file and line for a malformed line."""
    rows = (row for file in find_files(options.path, SUFFIXES) for row in read_file(file))
    for where, row in rows:
        if options.field not in row:
            raise DataError(
                f"{where}: the key {options.field!r} is missing (found: {', '.join(row) or 'nothing'}). Set option "
                "'field' (--data-field, --text-field) to the key of the text."
            )
        text = row.pop(options.field)
        if not isinstance(text, str):
            raise DataError(f"{where}: {options.field!r} is {json.dumps(text)[:40]}, not text. Delete the line.")
        yield text


def fingerprint(options: Options) -> str:
    """Return a digest of the files' names, sizes and modification times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


PLUGIN = TextSource(
    describe="JSON Lines, one document per line (options: path, field)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
