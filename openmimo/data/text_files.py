"""The text source that reads a file or folder of the user: found by the suffix of its files."""

from collections import Counter
from pathlib import Path

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.config import SourceConfig

_SOURCES = {
    ".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text_folder", ".md": "text_folder", ".py": "text_folder",
}  # fmt: skip
_FIELDS = {"jsonl": "field", "parquet": "column"}
_ADVICE = {
    ".json": "Write one object per line as .jsonl: jq -c '.[]' FILE.json > FILE.jsonl",
    ".csv": "Write one object per line as .jsonl, or a Parquet file",
    ".tsv": "Write one object per line as .jsonl, or a Parquet file",
    ".arrow": "Write a Parquet file",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


def text_source(path: str, field: str | None = None) -> SourceConfig:
    """The source of the texts in `path`, with all its options.

    A .jsonl file has one document per line, a .parquet file one per row, any other file is one document. A folder
    contains files of one of these kinds.

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
    suffix = file.suffix.lower()
    if suffix in _ADVICE:
        raise DataError(f"{file}: {suffix} files are not read as texts. {_ADVICE[suffix].replace('FILE', file.stem)}.")
    if suffix in _PACKED:
        suffix = Path(file.stem).suffix.lower()  # the source names the compression
    return _SOURCES.get(suffix, "text_folder")


def _source_of_folder(folder: Path) -> str:
    suffixes = [file.suffix.lower() for file in folder.rglob("*") if file.is_file()]
    found = Counter(_SOURCES[suffix] for suffix in suffixes if suffix in _SOURCES)
    if len(found) > 1:
        kinds = ", ".join(sorted({suffix for suffix in suffixes if suffix in _SOURCES}))
        raise DataError(f"{folder} contains files of several kinds ({kinds}). Give one kind, or one file.")
    return next(iter(found), "text_folder")
