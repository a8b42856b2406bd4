"""Writing so that nothing is ever half there: a file or a folder appears whole, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_text_atomic(path: Path, text: str) -> None:
    """Writes `text` beside `path`, flushes it to the disk, then renames it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder_atomic(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; renames it to `path` if the block succeeds, deletes it if it fails.

    An existing folder of that name is replaced only after the new one is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        _flush_folder(temporary)
        replaced = None
        if path.exists():
            replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, replaced)
        os.replace(temporary, path)
        _flush_entry(path.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            _flush_entry(file)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
