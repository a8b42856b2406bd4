"""Files: atomic writes, the removal of unfinished ones after a crash, and checked reads of what other programs wrote.

Unfinished files and folders are named `.NAME.RANDOM.tmp`. The writer holds a lock (flock) on them, which the kernel
releases when the writer exits. Unfinished work of a live process is therefore never removed.

Only regular files are read, so that a pipe or a device cannot block. A file of a model folder must be inside that
folder, with one exception: snapshots in the Hugging Face cache link to the `blobs` folder of their repository.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from openmimo.core.errors import CheckpointError, ConfigError, UserError
from openmimo.core.fields import checked, field_types, required_fields, shortened, unknown_key_message

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def cache_folder() -> Path:
    """Return $OPENMIMO_CACHE, or else ~/.cache/openmimo. It may not exist, and its files can be recreated."""
    return Path(os.environ.get("OPENMIMO_CACHE") or Path.home() / ".cache" / "openmimo")


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to a temporary file, flush it to the disk, and rename it to `path`.

    Raises:
        OSError: The file cannot be written. The error names it, and an existing file is unchanged.
    """
    with new_file_atomic(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def new_file_atomic(path: Path) -> Iterator[BinaryIO]:
    """Yield an empty temporary file. It is renamed to `path` if the block succeeds, and deleted if the block fails.

    Raises:
        OSError: The file cannot be written. The error names it, and an existing file is unchanged.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _claim(path, is_folder=False)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(descriptor)
                os.replace(temporary, path)
            _flush_entry(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder_atomic(path: Path) -> Iterator[Path]:
    """Yield an empty folder. It is renamed to `path` if the block succeeds, and deleted if the block fails.

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
    """Complete an interrupted replacement of the folder `path`.

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
    """Remove the unfinished files and folders in `folder` whose writers have exited.

    Args:
        folder: The folder; it need not exist.
        of: Final name of the files and folders to remove (None: all).
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
    """Hold the lock of an existing file or folder during the block. Yields its descriptor.

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
    """Add the file name `path` to an OSError of the block that has none (e.g. for a full disk)."""
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
    """Create a temporary file or folder next to `path`. Returns it with the descriptor that holds its lock."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if is_folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # Another process may consider the entry abandoned and remove it before the lock is held. Then try again.
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
    """Exchange two paths atomically (renameat2). Returns False if the system or the file system does not support it."""
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


MAX_TEXT_BYTES = 1 << 28  # ten times the size of the largest index and tokenizer.json of published models
_LISTED, _MAX_CHARACTERS = 20, 500
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
Schema = TypeVar("Schema")


def require_folder(folder: Path | str, error: type[UserError] = CheckpointError) -> Path:
    """Return `folder` as a path. Raises `error` if it is not a folder, or the folder of a run, which has a model."""
    if folder == "":
        raise error("the path of the checkpoint is empty; give the path of a checkpoint folder.")
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "does not exist"
        raise error(f"{folder} {found}; a checkpoint is a folder with config.json, *.safetensors and a tokenizer.")
    if (folder / "model" / "config.json").exists() and not any(folder.glob("*.safetensors")):
        raise error(f"{folder} is the folder of a run. Give the folder of its model: {folder / 'model'}.")
    return folder


def require_file(path: Path | str, error: type[UserError] = ConfigError) -> Path:
    """Return the path of a regular file that this user can read. Raises `error` otherwise."""
    path = Path(path)
    _check_regular(path, error)
    return path


def file_in_folder(folder: Path, name: str, error: type[UserError] = CheckpointError) -> Path | None:
    """Return the path of the file `name` in a model folder; None if it does not exist.

    Raises:
        UserError: `error`, if the name contains a path or is not a readable regular file inside that folder.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise error(
            f"{folder} refers to the file {shortened(name)}; file names of a checkpoint must not contain a path."
        )
    path = folder / name
    if not os.path.lexists(path):
        return None
    _check_regular(path, error)
    _check_inside(folder, path, error)
    return path


def read_text(path: Path | str, error: type[UserError] = ConfigError) -> str:
    """Read a regular UTF-8 file of at most MAX_TEXT_BYTES. Raises `error` otherwise."""
    path = Path(path)
    _check_regular(path, error)
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise error(f"{path} has {size:,} bytes; a file of this kind has at most {MAX_TEXT_BYTES:,}.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text: {problem}.") from problem
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.") from problem


def read_json(path: Path | str, error: type[UserError] = ConfigError) -> Any:
    """Parse a JSON file. Raises `error`, with file and line, if it is missing, malformed or not a regular file."""
    return parse_json(read_text(path, error), str(path), error)


def parse_json(text: str, where: str, error: type[UserError] = ConfigError) -> Any:
    """Parse JSON strictly. Duplicate keys and lone surrogates raise `error`."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as problem:
        raise error(f"{where} is not valid JSON: it contains a lone surrogate ({problem.reason}).") from problem
    except RecursionError as problem:
        raise error(f"{where} is not valid JSON: it is nested too deeply.") from problem
    except ValueError as problem:
        raise error(f"{where} is not valid JSON: {problem}.") from problem
    return value


def read_known_keys(
    schema: type[Schema],
    values: Any,
    where: str,
    *,
    error: type[UserError] = ConfigError,
    inert: Iterable[str] | None = None,
) -> Schema:
    """Build the dataclass `schema` from a JSON object, with the types and bounds of its annotations.

    Args:
        schema: A dataclass.
        values: The parsed object.
        where: The source of the object, for messages.
        error: The class to raise. One error lists all findings, each with `where` and its key.
        inert: Additional keys that are allowed and ignored; None allows every key.
    """
    if not isinstance(values, dict):
        raise error(f"{where} must be a JSON object, not a {type(values).__name__}.")
    schema_type: Any = schema
    types = field_types(schema_type)
    built: dict[str, Any] = {}
    findings: list[str] = []
    for key, value in values.items():
        if key in types:
            try:
                built[key] = checked(types[key], value, f"{where}: {key}")
            except ConfigError as finding:
                findings.append(str(finding))
        elif inert is not None and key not in inert:
            findings.append(
                unknown_key_message(key, types, where)
                + ". Remove it if it has no effect; ignoring a key may silently change the model."
            )
    missing = [key for key in required_fields(schema_type) if key not in values]
    if missing:
        findings.append(f"{where} lacks {', '.join(map(repr, missing))}.")
    if findings:
        raise error(listed(findings))
    return schema(**built)


def listed(findings: list[str], separator: str = " ") -> str:
    """Join the findings of a check into one text: the first 20, and the number of the others."""
    shown = [text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "..." for text in findings[:_LISTED]]
    more = [f"There are {len(findings) - _LISTED} more."] if len(findings) > _LISTED else []
    return separator.join(shown + more)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shortened(duplicate)} occurs twice in one object")
    return found


def _check_regular(path: Path, error: type[UserError]) -> None:
    try:
        status = path.stat()
    except FileNotFoundError as problem:
        link = " (the link is dangling)" if path.is_symlink() else ""
        raise error(f"{path} does not exist{link}.") from problem
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}.") from problem
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} is {_KINDS.get(stat.S_IFMT(status.st_mode), 'not a regular file')}, not a file.")
    if not os.access(path, os.R_OK):
        raise error(f"{path} cannot be read by this user (its mode is {stat.S_IMODE(status.st_mode):o}); chmod a+r it.")


def _check_inside(folder: Path, path: Path, error: type[UserError]) -> None:
    if not path.is_symlink():
        return
    target, home = path.resolve(), folder.resolve()
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    blobs = snapshots.parent / "blobs" if snapshots else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise error(f"{path} is a link to {target}, outside its folder; replace the link with the file.")
