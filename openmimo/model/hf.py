"""Checkpoints in the Hugging Face layout: load and save.

Names are in `hf_names`, storage in `hf_reader` and `hf_writer`, other dtypes and layouts in `convert`.
"""

import json
import shutil
from pathlib import Path

import torch

from openmimo.core.config import read_json
from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.files import new_folder_atomic
from openmimo.model.config import ModelConfig
from openmimo.model.hf_config import config_from_hf, config_to_hf
from openmimo.model.hf_names import count_mtp_heads, slots
from openmimo.model.hf_reader import CheckpointReader
from openmimo.model.hf_writer import DEFAULT_SHARD_BYTES, Entry, write_shards
from openmimo.model.mimo import MiMo
from openmimo.runtime.device import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def load_config(path: str | Path, *, window_keys: int | None = None) -> ModelConfig:
    """The config of a checkpoint folder; MTP heads are counted in the weights where config.json does not state them."""
    folder = Path(path)
    return open_checkpoint(folder, window_keys)[0]


def load_model(
    path: str | Path, dtype: str = "float32", device: str = "cpu", *, window_keys: int | None = None
) -> MiMo:
    """Loads a checkpoint folder in the Hugging Face layout, ours or theirs, FP8 included.

    dtype: float32, bfloat16, float16 or float64, for all but the router, which stays float32 (float64 in float64).
    window_keys: overrides how many keys a sliding layer's query sees (see `hf_config`). The weights are streamed: peak
    memory is the model and one shard. Raises CheckpointError that lists all missing, unexpected, misshaped and
    unreadable tensors at once, before any is read.
    """
    if not isinstance(path, (str, Path)):
        raise ConfigError(f"path is {path!r}, a {type(path).__name__}; give the path of a checkpoint folder.")
    torch_dtype, torch_device = _dtype(dtype), resolve_device(device)
    config, reader = open_checkpoint(Path(path), window_keys)
    with torch.device("meta"):
        model = MiMo(config)
    check_fit(model, reader)
    model = model.to(torch_dtype)
    for router in model.routers().values():
        router.to(torch.promote_types(torch_dtype, torch.float32))
    model = model.to_empty(device=torch_device)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    by_name = {slot.name: slot for slot in slots(model)}
    with torch.no_grad():
        for name in reader.names_by_file(set(by_name)):
            by_name[name].target.copy_(by_name[name].from_checkpoint(reader.read(name, config)))
    return model.eval()


def save_model(model: MiMo, path: str | Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Writes safetensors and `config.json` that transformers and we load; the folder appears whole or not at all.

    Tensors keep their dtype. A checkpoint that is there already is replaced, its tokenizer files stay; a folder that
    holds anything else is refused with a CheckpointError.
    """
    path = Path(path)
    others = [file.name for file in path.iterdir() if not _is_checkpoint_file(file)] if path.is_dir() else []
    if others:
        raise CheckpointError(f"{path} holds {others[0]}, which is no part of a checkpoint; save to a new folder.")
    with new_folder_atomic(path) as folder:
        copy_tokenizer(path, folder)
        write_model(model, folder, max_shard_bytes=max_shard_bytes)


def _is_checkpoint_file(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name in (
        "config.json",
        "model.safetensors.index.json",
        *_TOKENIZER_FILES,
    )


def _check_floating(model: MiMo) -> None:
    narrow = next((name for name, tensor in model.named_parameters() if not tensor.is_floating_point()), None)
    if narrow:
        raise CheckpointError(f"{narrow} is {model.get_parameter(narrow).dtype}; a quantised model cannot be saved.")


def write_model(model: MiMo, folder: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """The files of `save_model`, into a folder that exists and that the caller makes atomic."""
    _check_floating(model)
    entries = [
        Entry(
            slot.name,
            tuple(slot.target.shape),
            slot.target.dtype,
            lambda slot=slot: slot.from_checkpoint(slot.target),
        )
        for slot in slots(model)
    ]
    write_config(model.config, folder, dtype=str(model.model.embed_tokens.weight.dtype).removeprefix("torch."))
    write_shards(folder, entries, max_shard_bytes=max_shard_bytes)


def write_config(config: ModelConfig, folder: Path, *, dtype: str = "float32", extra: dict | None = None) -> None:
    """Writes `config.json` alone."""
    values = config_to_hf(config, dtype=dtype) | (extra or {})
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def open_checkpoint(folder: Path, window_keys: int | None) -> tuple[ModelConfig, CheckpointReader]:
    """The config and an open reader of a checkpoint folder; MTP heads are counted where config.json is silent."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; a checkpoint is a folder with config.json and *.safetensors.")
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    config = config_from_hf(values, where=where, window_keys=window_keys)
    reader = CheckpointReader(folder)
    heads = count_mtp_heads(reader.names(), config)
    stated = values.get("num_nextn_predict_layers")
    if stated is not None and stated != heads:
        raise CheckpointError(
            f"{where} states {stated} MTP heads (num_nextn_predict_layers), but the weights hold {heads}."
        )
    return config_from_hf(values, where=where, window_keys=window_keys, num_mtp_heads=heads), reader


def check_fit(model: MiMo, reader: CheckpointReader) -> None:
    """Raises one CheckpointError with everything that does not fit between the model and the files' headers."""
    expected = {slot.name: tuple(slot.target.shape) for slot in slots(model)}
    found = reader.names()
    unexpected = found - set(expected)
    if model.config.tie_embeddings:
        unexpected -= {"lm_head.weight"}
    present = sorted(found & set(expected))
    findings = {
        "missing": sorted(set(expected) - found),
        "unexpected": sorted(unexpected),
        "of another shape": [
            f"{name} (is {list(reader.shape(name, model.config))}, must be {list(expected[name])})"
            for name in present
            if reader.shape(name, model.config) != expected[name]
        ],
        "unreadable": [problem for name in present if (problem := reader.problem(name, model.config))],
    }
    if any(findings.values()):
        listed = "; ".join(f"{len(names)} {what}: {', '.join(names[:20])}" for what, names in findings.items() if names)
        raise CheckpointError(f"{reader.folder} does not fit its config.json: {listed}.")


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copies the tokenizer's files from one checkpoint folder to another, those that exist."""
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, destination / name)


def _dtype(name: str) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]
