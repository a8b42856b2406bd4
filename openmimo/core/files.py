"""Atomic file and folder writes, and the removal of what a killed process left unfinished.

Unfinished files and folders are named `.NAME.RANDOM.tmp`. The process that writes one holds its lock (flock), which the
kernel releases when the process ends: so the unfinished work of a live process is never taken for a dead one's.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def write_text_atomic(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) under another name, flushes it to the disk, then renames it to `path`.

    Raises:
        OSError: The file cannot be written; the error names it, and a file that was there before is unchanged.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _claim(path, is_folder=False)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
                os.replace(temporary, path)
            _flush_entry(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder_atomic(path: Path) -> Iterator[Path]:
    """Yields an empty folder; renames it to `path` if the block succeeds, deletes it if the block fails.

    An existing folder is replaced in one step once the new one is complete. Files get the mode that the umask gives.

    Raises:
        OSError: The folder cannot be written; the error names a file. A folder that was there before is unchanged.
    """
    path = Path(os.path.realpath(path))
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        remove_unfinished(path.parent, of=path.name)
        temporary, descriptor = _claim(path, is_folder=True)
        try:
            yield temporary
            _flush_folder(temporary)
            _put_in_place(temporary, path)
            _flush_entry(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(descriptor)


def recover_folder(path: Path) -> None:
    """Finishes a replacement of the folder `path` during which the process was killed.

    Only file systems that cannot exchange two folders in one step need it: there, the old folder may have another name.
    """
    path = Path(path)
    for replaced in _hidden(path.parent, rf"\.{re.escape(path.name)}\.(\d+\.)?old"):
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(replaced, path)


def remove_unfinished(folder: Path, *, of: str | None = None) -> None:
    """Removes the unfinished files and folders in `folder` whose writers are dead.

    Args:
        folder: May be missing.
        of: Only those that were to get this name (None: all).
    """
    name = r"\..*" if of is None else rf"\.{re.escape(of)}\.[^.]+"
    for path in _hidden(Path(folder), rf"{name}\.tmp"):
        with contextlib.suppress(OSError), locked(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds the lock of an existing file or folder inside the block; yields its descriptor.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError of the block that names no file (a full disk, say) the name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _hidden(folder: Path, pattern: str) -> list[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(entry for entry in folder.iterdir() if re.fullmatch(pattern, entry.name))
    return []


def _claim(path: Path, *, is_folder: bool) -> tuple[Path, int]:
    """A new file or folder next to `path`, and its descriptor, which holds its lock."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if is_folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # Before the lock is held, another process may take it for abandoned and remove it: then claim another one.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(temporary, os.O_RDONLY if is_folder else os.O_WRONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, descriptor
            os.close(descriptor)


def _put_in_place(folder: Path, path: Path) -> None:
    if not path.exists():
        os.replace(folder, path)
    elif not _exchange(folder, path):
        replaced = path.with_name(f".{path.name}.old")
        os.replace(path, replaced)
        os.replace(folder, path)
        shutil.rmtree(replaced)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two paths in one step (renameat2). False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


def _flush_folder(folder: Path) -> None:
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            _flush_entry(file)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
