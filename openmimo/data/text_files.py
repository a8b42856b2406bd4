"""The text source that reads a file or folder of the user: found by the suffix of its files."""

from collections import Counter
from pathlib import Path

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.config import SourceConfig
from openmimo.data.source import PACKED_SUFFIXES

_SOURCES = {
    ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet",
    ".txt": "text_folder", ".md": "text_folder", ".py": "text_folder",
}  # fmt: skip
_FIELDS = {"jsonl": "field", "parquet": "column"}
_ADVICE = {
    ".csv": "Write one object per line as .jsonl, or a Parquet file",
    ".tsv": "Write one object per line as .jsonl, or a Parquet file",
    ".arrow": "Write a Parquet file",
}


def text_source(path: str, field: str | None = None) -> SourceConfig:
    """The source of the texts in `path`, with all its options.

    A .jsonl or .json file has one document per line, a .parquet file one per row, any other file is one document. Files
    may be compressed (.gz, .zst). A folder contains files of one of these kinds.

    Args:
        path: A file or folder.
        field: The key (JSON Lines) or column (Parquet) of the text (None: "text").

    Raises:
        DataError: There is no such file, or its kind is not read.
        ConfigError: `field` is given for plain text.
    """
    place = Path(path).expanduser()
    if not path.strip() or "\0" in path or not place.exists():
        raise DataError(f"{path!r} does not exist. Give a text file, a .jsonl file, a .parquet file, or a folder.")
    name = _source_of_folder(place) if place.is_dir() else _source_of_file(place)
    if name not in _FIELDS:
        if field is not None:
            raise ConfigError(f"{path} is plain text, so the field {field!r} has no effect; omit it.")
        return SourceConfig(name, options={"path": path})
    return SourceConfig(name, options={"path": path, _FIELDS[name]: field or "text"})


def _source_of_file(file: Path) -> str:
    suffix = _suffix(file)
    if suffix in _ADVICE:
        raise DataError(f"{file}: {suffix} files are not read as texts. {_ADVICE[suffix]}.")
    return _SOURCES.get(suffix, "text_folder")


def _source_of_folder(folder: Path) -> str:
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() != ".json"]
    suffixes = [_suffix(file) for file in files]
    found = Counter(_SOURCES[suffix] for suffix in suffixes if suffix in _SOURCES)
    if len(found) > 1:
        kinds = ", ".join(sorted({suffix for suffix in suffixes if suffix in _SOURCES}))
        raise DataError(f"{folder} contains files of several kinds ({kinds}). Give one kind, or one file.")
    return next(iter(found), "text_folder")


def _suffix(file: Path) -> str:
    """The suffix in lower case; of a compressed file, the one before it."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in PACKED_SUFFIXES else suffix
