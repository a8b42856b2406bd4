"""Reading of files that other programs wrote, above all model folders.

Only regular files are opened, so that a pipe or a device cannot block. A file of a model folder must be inside that
folder, with one exception: snapshots in the Hugging Face cache link to the `blobs` folder of their repository.
"""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from openmimo.core.errors import CheckpointError, ConfigError, UserError
from openmimo.core.fields import checked, field_types, required_fields, shortened, unknown_key_message

MAX_TEXT_BYTES = 1 << 28  # ten times the index and tokenizer.json of the largest published models
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
    """Returns `folder` as a path. Raises `error` if it is not a folder."""
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "does not exist"
        raise error(f"{folder} {found}; a checkpoint is a folder with config.json, *.safetensors and a tokenizer.")
    return folder


def file_in_folder(folder: Path, name: str, error: type[UserError] = CheckpointError) -> Path | None:
    """The path of the file `name` in a model folder; None if it does not exist.

    Raises `error` if the name contains a path, or is not a readable regular file inside that folder.
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
    """The text of a regular UTF-8 file of at most MAX_TEXT_BYTES. Raises `error` otherwise."""
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
    """Parses a JSON file. Raises `error`, with file and line, if it is missing, malformed or not a regular file."""
    return parse_json(read_text(path, error), str(path), error)


def parse_json(text: str, where: str, error: type[UserError] = ConfigError) -> Any:
    """Parses JSON strictly: duplicate keys and lone surrogates raise `error`."""
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
    """Builds the dataclass `schema` from a JSON object, with the types and bounds of its annotations.

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
    """The findings of a check as one text: the first ones, and the number of the others."""
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
