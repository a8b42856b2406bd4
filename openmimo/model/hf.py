"""Checkpoints in the Hugging Face layout: load and save.

Names are in `hf_names`, storage in `hf_reader` and `hf_writer`, other dtypes and layouts in `convert`.
"""

import functools
import json
import re
import sys
from pathlib import Path

import torch

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.files import new_folder_atomic, recover_folder
from openmimo.core.reading import file_in_folder, listed, read_json, require_folder
from openmimo.data.companions import companion_names, read_companions
from openmimo.data.tokenizer import Tokenizer
from openmimo.kernels.weights import format_of
from openmimo.model.config import ModelConfig
from openmimo.model.hf_config import config_from_hf, config_to_hf
from openmimo.model.hf_names import count_mtp_heads, slots
from openmimo.model.hf_reader import INDEX, CheckpointReader
from openmimo.model.hf_writer import DEFAULT_SHARD_BYTES, Entry, write_shards
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import QuantizableModule, allocate_quantized, quantized_format
from openmimo.runtime.device import DTYPES, resolve_device


def load_config(path: str | Path, *, window_keys: int | None = None) -> ModelConfig:
    """The config of a checkpoint folder; MTP heads are counted in the weights where config.json does not state them."""
    folder = Path(path)
    return open_checkpoint(folder, window_keys)[0]


def load_model(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    window_keys: int | None = None,
    weights: str = "plain",
) -> MiMo:
    """Loads a checkpoint folder in the Hugging Face layout, ours or theirs, FP8 included.

    The weights are streamed: peak memory is the model and one shard.

    Args:
        path: The folder.
        dtype: float32, bfloat16, float16 or float64, for all but the router, which stays float32 (float64 in float64).
        device: A device of torch, or auto.
        window_keys: Overrides how many keys a sliding layer's query sees (see `hf_config`).
        weights: plain (in `dtype`; FP8 is dequantized), int8 (linear layers and experts with a scale for each output),
            or fp8 (the matrices that the published checkpoint stores as FP8; codes and scales of an FP8 checkpoint stay
            as they are stored). Quantized models are for inference and cannot be saved.

    Raises:
        CheckpointError: Lists all missing, unexpected, misshaped and unreadable tensors, before any is read.
        ConfigError: An argument is unknown.
    """
    _check_path(path)
    weight_format = quantized_format(weights)
    weights_dtype, weights_device = _dtype(dtype), resolve_device(device)
    config, reader = open_checkpoint(Path(path), window_keys)
    companions = read_companions(Path(path))
    with torch.device("meta"):
        model = MiMo(config)
    check_fit(model, reader)
    model.companions = companions
    model = model.to(weights_dtype)
    for router in model.routers().values():
        router.to(torch.promote_types(weights_dtype, torch.float32))
    if weight_format is not None:
        allocate_quantized(model, weight_format, config.qkv_ranks)
    model = model.to_empty(device=weights_device)
    model.tie_weights()
    by_name = {slot.name: slot for slot in slots(model)}
    with torch.no_grad():
        for name in reader.names_by_file(set(by_name)):
            by_name[name].fill(reader.read_weight(name, config))
    return model.eval()


def save_model(
    model: MiMo,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes safetensors and `config.json` that transformers and we load; the folder appears whole or not at all.

    Tensors keep their dtype. The tokenizer's files, with chat template and stop tokens, are those of `tokenizer`, else
    of the folder that the model was loaded from, else those that `path` holds already. A checkpoint that is there
    already is replaced; a folder that holds anything else is refused with a CheckpointError.
    """
    _check_path(path)
    if not isinstance(model, MiMo):
        raise ConfigError(f"model is of type {type(model).__name__}; give a MiMo, such as load_model returns.")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"tokenizer is of type {type(tokenizer).__name__}; give a Tokenizer or None.")
    if not isinstance(max_shard_bytes, int) or isinstance(max_shard_bytes, bool) or max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes!r}; it must be an integer of at least 1.")
    path = Path(path)
    recover_folder(path)
    check_replaceable(path)
    kept = read_companions(path)
    with new_folder_atomic(path) as folder:
        kept.write(folder)
        write_model(model, folder, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)


def check_replaceable(path: Path) -> None:
    """Raises CheckpointError if `path` is a file, or a folder that holds anything but a checkpoint."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; save to a new folder.")
    others = _other_files(path) if path.is_dir() else []
    if others:
        raise CheckpointError(f"{path} holds {others[0]}, which is no part of a checkpoint; save to a new folder.")


def _other_files(folder: Path) -> list[str]:
    """What a folder holds that is no part of a checkpoint."""
    ours = {"config.json", INDEX, *(name.split("/")[0] for name in companion_names(folder))}
    return [path.name for path in folder.iterdir() if path.suffix != ".safetensors" and path.name not in ours]


def _check_plain(model: MiMo) -> None:
    """Raises CheckpointError for a model with block-scaled weights."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizableModule) and module.blocks:
            part = next(iter(module.blocks))
            weight_format = format_of(module.held_weight(part))
            raise CheckpointError(
                f"{name}.{part} is held as {weight_format}, and a quantized model cannot be saved. Load it with "
                "weights='plain', or write an FP8 checkpoint with `openmimo convert`."
            )


def write_model(
    model: MiMo, folder: Path, *, tokenizer: Tokenizer | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """The files of `save_model`, into a folder that exists and that the caller makes atomic."""
    _check_plain(model)
    companions = model.companions if tokenizer is None else tokenizer.companions
    if model.is_extended:
        companions = companions.with_max_length(model.config.max_positions)
    if companions.files:
        companions.write(folder)
    entries = [
        Entry(
            slot.name,
            tuple(slot.target.shape),
            slot.plain_target.dtype,
            slot.to_checkpoint,
        )
        for slot in slots(model)
    ]
    write_config(model.config, folder, dtype=str(model.model.embed_tokens.dtype).removeprefix("torch."))
    write_shards(folder, entries, max_shard_bytes=max_shard_bytes)


def write_config(config: ModelConfig, folder: Path, *, dtype: str = "float32", extra: dict | None = None) -> None:
    """Writes `config.json` alone."""
    values = config_to_hf(config, dtype=dtype) | (extra or {})
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def open_checkpoint(folder: Path, window_keys: int | None) -> tuple[ModelConfig, CheckpointReader]:
    """The config and an open reader of a checkpoint folder; MTP heads are counted where config.json is silent."""
    recover_folder(folder)
    path = file_in_folder(require_folder(folder), "config.json")
    if path is None:
        raise CheckpointError(f"{folder} holds no config.json; a checkpoint is a folder with config.json and weights.")
    values = read_json(path)
    config = config_from_hf(values, where=str(path), window_keys=window_keys)
    reader = CheckpointReader(folder)
    names = reader.names()
    heads = count_mtp_heads(names, config)
    stated = values.get("num_nextn_predict_layers")
    if stated and not heads:
        _warn_once(f"{path} states {stated} MTP heads, but the weights hold none: the model has no MTP heads.")
    elif stated is not None and stated != heads:
        raise CheckpointError(
            f"{path} states {stated} MTP heads (num_nextn_predict_layers), but the weights hold {heads}. "
            f"Set it to {heads} if that is right."
        )
    _check_counts(config, names, path)
    return config_from_hf(values, where=str(path), window_keys=window_keys, num_mtp_heads=heads), reader


def _check_counts(config: ModelConfig, names: set[str], path: Path) -> None:
    """Refuses a config.json of more layers or experts than the weights hold, before a model of that size is built."""
    stated = {"num_hidden_layers": len(config.layers)}
    numbers = {"num_hidden_layers": r"model\.layers\.(\d{1,9})\."}
    if config.moe is not None:
        stated["n_routed_experts"] = config.moe.num_experts
        numbers["n_routed_experts"] = r"model\.layers\.\d+\.mlp\.experts\.(\d{1,9})\."
    for key, pattern in numbers.items():
        held = {int(match[1]) for name in names if (match := re.match(pattern, name))}
        if stated[key] > max(held, default=-1) + 1:
            raise CheckpointError(f"{path}: {key} is {stated[key]}, but the weights hold {max(held, default=-1) + 1}.")


@functools.cache
def _warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def check_fit(model: MiMo, reader: CheckpointReader) -> None:
    """Raises one CheckpointError with everything that does not fit between the model and the files' headers.

    A stored output head of a model with tied embeddings is compared with them.
    """
    expected = {slot.name: tuple(slot.target.shape) for slot in slots(model)}
    found = reader.names()
    if model.config.tie_embeddings and "lm_head.weight" in found:  # stored all the same, as some programs do
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    present = sorted(found & set(expected))
    findings = {
        "missing": sorted(set(expected) - found),
        "unexpected": sorted(found - set(expected)),
        "of another shape": [
            f"{name} (is {list(reader.shape(name, model.config))}, must be {list(expected[name])})"
            for name in present
            if reader.shape(name, model.config) != expected[name]
        ],
        "unreadable": [problem for name in present if (problem := reader.problem(name, model.config))],
    }
    if any(findings.values()):
        parts = [f"{len(names)} {what}: {listed(names, ', ')}" for what, names in findings.items() if names]
        raise CheckpointError(f"{reader.folder} does not fit its config.json: {'; '.join(parts)}.")
    _check_tied(reader, model.config)


def _check_tied(reader: CheckpointReader, config: ModelConfig) -> None:
    """Refuses tied embeddings next to an output head of its own: one of the two statements is wrong."""
    if not config.tie_embeddings or "lm_head.weight" not in reader.names():
        return
    head, embedding = (reader.read(name, config) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if not torch.equal(head.float(), embedding.float()):
        raise CheckpointError(
            f"{reader.folder} has tie_word_embeddings true in its config.json, but an lm_head.weight that differs from "
            "model.embed_tokens.weight. Set it to false, or remove the tensor."
        )


def _check_path(path: str | Path) -> None:
    """Raises ConfigError for what cannot be the path of a folder."""
    if not isinstance(path, (str, Path)):
        raise ConfigError(f"path is {path!r}, a {type(path).__name__}; give the path of a checkpoint folder.")
    if not str(path) or "\0" in str(path):
        raise ConfigError(f"path is {str(path)!r}; give the path of a checkpoint folder.")


def _dtype(name: str) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]
