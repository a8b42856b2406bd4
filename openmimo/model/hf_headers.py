"""The headers of a checkpoint folder's safetensors files: which file holds which tensor, and whether they agree."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from openmimo.core.errors import CheckpointError
from openmimo.core.reading import file_in_folder, listed, parse_json, read_json, read_known_keys, require_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class _Index:
    """What is read of `model.safetensors.index.json`: the file of each tensor."""

    weight_map: dict[str, str]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder: of the files that its index names, else of all its safetensors files.

    Raises one CheckpointError with everything that is wrong: a missing or damaged file, a tensor that two files hold,
    an entry of the index that names another file than the one that holds the tensor.
    """
    require_folder(folder)
    weight_map = _read_index(folder)
    names = set(weight_map.values()) if weight_map else {path.name for path in folder.glob("*.safetensors")}
    if not names:
        raise CheckpointError(f"{folder} holds no *.safetensors file.")
    findings: list[str] = []
    stored: dict[str, StoredTensor] = {}
    for name in sorted(names):
        try:
            header = _read_header(folder, name)
        except CheckpointError as error:
            findings.append(str(error))
            continue
        findings += [
            f"{folder} holds {tensor} twice, in {stored[tensor].file} and {name}; remove the file that is not of it."
            for tensor in sorted(header.keys() & stored.keys())
        ]
        stored |= header
    if weight_map and SINGLE not in names and (folder / SINGLE).exists():
        findings.append(f"{folder} holds {SINGLE}, which its index does not name. Remove the one that is out of date.")
    if not findings:
        findings = _contradictions(folder / INDEX, weight_map, stored)
    if findings:
        raise CheckpointError(listed(findings))
    return stored


def open_safetensors(path: Path) -> Any:
    """An open safetensors file whose header and size have been checked. Raises CheckpointError."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). It is truncated or corrupt; copy it again.") from error


def _read_index(folder: Path) -> dict[str, str]:
    """The index's file of each tensor; empty if there is no index."""
    path = file_in_folder(folder, INDEX)
    if path is None:
        return {}
    weight_map = read_known_keys(_Index, read_json(path, CheckpointError), str(path), error=CheckpointError).weight_map
    if not weight_map:
        raise CheckpointError(f"{path} names no tensor in its weight_map.")
    return weight_map


def _read_header(folder: Path, name: str) -> dict[str, StoredTensor]:
    path = file_in_folder(folder, name)
    if path is None:
        raise CheckpointError(f"{folder / name} is missing, but the checkpoint's index names it. Download it again.")
    with open_safetensors(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, _MAX_HEADER_BYTES)).decode("utf-8")
    # The library has accepted the header; it keeps the last of two tensors of one name, which parse_json refuses.
    header = parse_json(text, f"the header of {path}", CheckpointError)
    header.pop("__metadata__", None)
    return {tensor: StoredTensor(name, tuple(entry["shape"]), entry["dtype"]) for tensor, entry in header.items()}


def _contradictions(index: Path, weight_map: dict[str, str], stored: dict[str, StoredTensor]) -> list[str]:
    lost = sorted(name for name in weight_map if name not in stored)
    findings = [f"{index} names {name} in {weight_map[name]}, but no file that it names holds it." for name in lost]
    findings += [
        f"{index} names {name} in {file}, but {stored[name].file} holds it."
        for name, file in weight_map.items()
        if name in stored and stored[name].file != file
    ]
    return findings
