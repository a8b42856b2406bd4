"""Local texts: a file, or a folder of .txt, .md and .py files (also .gz and .zst). Each file is one document."""

from collections.abc import Iterator
from dataclasses import dataclass

from openmimo.data.compressed import read_whole, with_packed
from openmimo.data.source import TextSource, decoded, find_files, fingerprint_files

SUFFIXES = with_packed(".txt", ".md", ".py")


@dataclass(frozen=True)
class Options:
    """Options of source `text_folder`.

    Attributes:
        path: A text file, or a folder that is read recursively.
    """

    path: str


def documents(options: Options) -> Iterator[str]:
    """Return one document per file, in the order of the paths."""
    return (decoded(read_whole(file), file) for file in find_files(options.path, SUFFIXES))


def fingerprint(options: Options) -> str:
    """Return a digest of the files' names, sizes and modification times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


PLUGIN = TextSource(
    describe="a folder of .txt, .md and .py files, or one text file (option: path)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
