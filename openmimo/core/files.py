"""Atomic file and folder writes, and the removal of unfinished ones after a crash.

Unfinished files and folders are named `.NAME.RANDOM.tmp`. The writer holds a lock (flock) on them, which the kernel
releases when the writer exits. Unfinished work of a live process is therefore never removed.
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


def cache_folder() -> Path:
    """The folder that $OPENMIMO_CACHE names, else ~/.cache/openmimo. It may not exist; its files can be recreated."""
    return Path(os.environ.get("OPENMIMO_CACHE") or Path.home() / ".cache" / "openmimo")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) to a temporary file, flushes it to the disk, and renames it to `path`.

    Raises:
        OSError: The file cannot be written. The error names it, and an existing file is unchanged.
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
    """Yields an empty folder. Renames it to `path` if the block succeeds, and deletes it if the block fails.

    An existing folder is replaced in one step when the new one is complete. The umask determines the mode of files.

    Raises:
        OSError: The folder cannot be written. The error names a file, and an existing folder is unchanged.
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
    """Completes an interrupted replacement of the folder `path`.

    This is necessary only on file systems that cannot exchange two folders in one step. There, the old folder may be
    left under a temporary name.
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
        folder: It need not exist.
        of: Only those with this final name (None: all).
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
    """Holds the lock of an existing file or folder during the block, and yields its descriptor.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file cannot be opened, or its file system does not support locks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file name `path` to an OSError of the block that has none (e.g. for a full disk)."""
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
    """Creates a temporary file or folder next to `path`. Returns it with the descriptor that holds its lock."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if is_folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # Another process may remove the entry before the lock is held, because it looks abandoned: then try again.
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
    """Exchanges two paths atomically (renameat2). Returns False if the system or the file system cannot."""
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
