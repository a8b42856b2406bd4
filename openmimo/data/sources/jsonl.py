"""Documents in JSON Lines: one object a line, its text in one field."""

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
    """One document a line; empty lines are left out. A bad line is a DataError with file and line."""
    for where, row in read_objects(options.path):
        if not isinstance(row.get(options.field), str):
            raise DataError(
                f"{where}: no text under {options.field!r} (found: {', '.join(row)}). Name the right key by option "
                "'field'."
            )
        yield row[options.field]


def fingerprint(options: Options) -> str:
    """The files' names, sizes and times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


PLUGIN = TextSource(
    describe="JSON Lines, one document a line (options: path, field)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
