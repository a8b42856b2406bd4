"""Whole repositories, packages and manuals as documents, which are really long: each folder in `path` is one document.

The files of a folder follow each other in the order of their paths, each after a line with its path. Concatenated short
documents would have the length but no dependencies over it. Documents whose words depend on far earlier ones can be
repeated: a word depends on its last occurrence, and the share of words whose last occurrence is at least `far_words`
words back is the measure.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

from openmimo.core.fields import Bounds, NonNegativeInt, PositiveInt, check_fields
from openmimo.data.compressed import read_whole, with_packed
from openmimo.data.source import TextSource, decoded, find_files, fingerprint_files

SUFFIXES = with_packed(".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cpp", ".hpp", ".js", ".ts", ".toml", ".sh")
_WORD = re.compile(r"\w{4,}")


@dataclass(frozen=True)
class Options:
    """Options of source `repositories`.

    Attributes:
        path: A folder. Each folder in it is one document, and so is each text file directly in it.
        min_characters: Leave out shorter documents.
        far_words: Distance in words (of four characters or more) from which a dependency is far.
        min_far_share: Documents in which at least this share of the words has a far dependency are repeated.
        copies: How often such a document occurs.
    """

    path: str
    min_characters: NonNegativeInt = 0
    far_words: PositiveInt = 2048
    min_far_share: Annotated[float, Bounds(least=0, most=1)] = 0.1
    copies: PositiveInt = 1

    def __post_init__(self) -> None:
        check_fields(self, "source repositories")


def documents(options: Options) -> Iterator[str]:
    """Yield one document per folder or file in `path`, in the order of the names."""
    root = Path(options.path).expanduser()
    for _, files in groupby(find_files(options.path, SUFFIXES), key=lambda file: _member(root, file)):
        text = _joined(root, list(files))
        if len(text) >= options.min_characters:
            is_far = options.copies > 1 and far_share(text, options.far_words) >= options.min_far_share
            for _ in range(options.copies if is_far else 1):
                yield text


def far_share(text: str, far_words: int) -> float:
    """Return the share of words whose last occurrence is at least `far_words` words back."""
    last: dict[str, int] = {}
    far = count = 0
    for count, match in enumerate(_WORD.finditer(text), start=1):
        word = match.group()
        far += word in last and count - last[word] >= far_words
        last[word] = count
    return far / count if count else 0.0


def fingerprint(options: Options) -> str:
    """Return a digest of the files' names, sizes and modification times."""
    return fingerprint_files(find_files(options.path, SUFFIXES))


def _member(root: Path, file: Path) -> str:
    """Return the name of the folder or file in `root` to which a file belongs."""
    return file.relative_to(root).parts[0] if file != root else file.name


def _joined(root: Path, files: list[Path]) -> str:
    texts = [decoded(read_whole(file), file) for file in files]
    if len(files) == 1 and files[0].parent in (root, root.parent):
        return texts[0]
    return "\n".join(f"# {file.relative_to(root).as_posix()}\n{text}" for file, text in zip(files, texts, strict=True))


PLUGIN = TextSource(
    describe="whole repositories or manuals: each folder in a folder is one long document (option: path)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
