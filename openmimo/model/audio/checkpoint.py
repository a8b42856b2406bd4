"""Tokenizer folders: `config.json` with the released keys, and weights under the released names.

Module names are those of the checkpoint, except that the released ones nest the codebooks more deeply.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from openmimo.core.errors import CheckpointError
from openmimo.core.files import file_in_folder, listed, new_folder_atomic, read_json, recover_folder, require_folder
from openmimo.model.audio.config import AudioTokenizerConfig, config_from_released, config_to_released
from openmimo.model.hf import check_replaceable
from openmimo.model.hf_files import (
    DEFAULT_SHARD_BYTES,
    Entry,
    StoredTensor,
    open_safetensors,
    read_headers,
    write_shards,
)

_OURS, _RELEASED = r"^encoder\.quantizer\.codebooks\.(\d+)\.", r"^encoder\.quantizer\.vq\.layers\.(\d+)\._codebook\."


def released_name(name: str) -> str:
    """Return the released name of one of our tensors."""
    return re.sub(_OURS, r"encoder.quantizer.vq.layers.\1._codebook.", name)


def own_name(name: str) -> str:
    """Return our name of a released tensor."""
    return re.sub(_RELEASED, r"encoder.quantizer.codebooks.\1.", name)


class StoredTokenizer(NamedTuple):
    """A tokenizer folder whose headers were read.

    Attributes:
        folder: The folder.
        config: The shape.
        tensors: The header entries by released name.
    """

    folder: Path
    config: AudioTokenizerConfig
    tensors: dict[str, StoredTensor]


def open_folder(path: Path | str) -> StoredTokenizer:
    """Read config and headers of a tokenizer folder.

    Raises:
        CheckpointError: Files are missing or damaged.
        ConfigError: The config is invalid.
    """
    folder = Path(path)
    recover_folder(folder)
    require_folder(folder)
    config_path = file_in_folder(folder, "config.json")
    if config_path is None:
        raise CheckpointError(f"{folder} holds no config.json; a tokenizer folder has config.json and *.safetensors.")
    config = config_from_released(read_json(config_path), str(config_path))
    return StoredTokenizer(folder, config, read_headers(folder))


def check_fit(tokenizer: nn.Module, stored: StoredTokenizer) -> None:
    """Raise CheckpointError unless the folder has exactly the tensors of the tokenizer, which may be on "meta"."""
    own, folder = tokenizer.state_dict(), stored.folder
    shapes = {own_name(name): entry.shape for name, entry in stored.tensors.items()}
    findings = [f"{folder} lacks {released_name(name)}." for name in own if name not in shapes]
    findings += [
        f"{folder} holds {name}, which the tokenizer of its config.json does not have."
        for name in stored.tensors
        if own_name(name) not in own
    ]
    findings += [
        f"{released_name(name)} in {folder} has shape {list(shapes[name])}, but config.json requires "
        f"{list(tensor.shape)}."
        for name, tensor in own.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    if findings:
        raise CheckpointError(listed(findings))


@torch.no_grad()
def fill(tokenizer: nn.Module, stored: StoredTokenizer) -> None:
    """Copy the tensors of a folder into a tokenizer that they fit. Raises CheckpointError if one is not finite."""
    own = tokenizer.state_dict()
    for file in sorted({entry.file for entry in stored.tensors.values()}):
        path = stored.folder / file
        reader = open_safetensors(path)
        for name in (name for name, entry in stored.tensors.items() if entry.file == file):
            try:
                tensor = reader.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(f"{path}: {name} cannot be read ({error}).") from error
            if not tensor.isfinite().all():
                raise CheckpointError(f"{path}: {name} holds an infinity or NaN. Copy the file again.")
            own[own_name(name)].copy_(tensor)


def save_weights(tokenizer: nn.Module, config: AudioTokenizerConfig, path: str | Path) -> None:
    """Write a tokenizer folder atomically. Raises CheckpointError if it has other files or cannot be written."""
    folder = Path(path)
    recover_folder(folder)
    check_replaceable(folder)
    try:
        with new_folder_atomic(folder) as unfinished:
            write_weights(tokenizer, config, unfinished)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the audio tokenizer {folder} could not be written: {error}.") from error


def write_weights(tokenizer: nn.Module, config: AudioTokenizerConfig, folder: Path) -> None:
    """Write the files of a tokenizer to an existing folder; the caller makes the write atomic."""
    (folder / "config.json").write_text(json.dumps(config_to_released(config), indent=2) + "\n")
    entries = [
        Entry(released_name(name), tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor.detach())  # type: ignore[misc]
        for name, tensor in tokenizer.state_dict().items()
    ]
    write_shards(folder, entries, max_shard_bytes=DEFAULT_SHARD_BYTES)


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters and codebook entries; windows and statistics do not count."""
    entries = sum(buffer.numel() for name, buffer in module.named_buffers() if name.endswith("embed"))
    return entries + sum(parameter.numel() for parameter in module.parameters())
