"""Load and save checkpoints in the Hugging Face layout, and the mapping between their tensors and model parameters.

Attribute names of the model are those of the checkpoint, so most tensors map to the parameter of the same name. There
are two exceptions. Experts are stored one by one, and the model stacks them. The MiMo-7B family has other names for the
parts of its MTP layer, and concatenates the hidden state before the embedding.

`hf_files` reads and writes the files, `hf_config` the config, `convert` changes dtypes and layouts.
"""

import functools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.files import file_in_folder, listed, new_folder_atomic, read_json, recover_folder, require_folder
from openmimo.data.tokenizer import Tokenizer
from openmimo.data.tokenizer_files import base_folder, companion_names, read_companions
from openmimo.kernels.weights import Packed, Packing, Weight, copy_weight, dequantized, format_of, rows_of, unbind
from openmimo.model.config import ModelConfig
from openmimo.model.hf_config import config_from_hf, config_to_hf, packed_config
from openmimo.model.hf_files import (
    DEFAULT_SHARD_BYTES,
    INDEX,
    Adapter,
    CheckpointReader,
    Entry,
    packed_entries,
    write_shards,
)
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import QuantizableModule, allocate_quantized, entry_weight, quantized_format
from openmimo.runtime.device import DTYPES, resolve_device

Model = TypeVar("Model", bound=MiMo)
CODEC_FOLDER = "codec"  # of the audio tokenizer in the folder of an audio language model


def load_config(path: str | Path, *, window_keys: int | None = None) -> ModelConfig:
    """Return the config of a checkpoint folder; its number of MTP heads is that of the weights."""
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
    """Load a published or saved checkpoint folder in the Hugging Face layout, including FP8.

    The weights are streamed: peak memory is the model and one shard. A folder of a LoRA adapter that peft has saved is
    merged into its base model.

    Args:
        path: The folder.
        dtype: float32, bfloat16, float16 or float64. The router is always float32 (float64 for float64).
        device: A torch device, or "auto".
        window_keys: Overrides the number of keys that a query of a sliding layer sees (see `hf_config`).
        weights: plain (in `dtype`; quantized weights are dequantized), int8 (linear layers and experts with a scale
            for each output), fp8 (the matrices that the published checkpoint stores as FP8; codes and scales of an FP8
            checkpoint stay as they are stored), or a packed format (linear layers and experts; those of a checkpoint
            in this format stay as they are stored). Quantized models are for inference. Only packed ones can be saved.

    Raises:
        CheckpointError: Lists all missing, unexpected, misshaped and unreadable tensors, before any is read.
        ConfigError: An argument is unknown.
    """
    _check_path(path)
    quantized_format(weights)
    checked_dtype(dtype)
    resolve_device(device)
    config, reader = open_checkpoint(Path(path), window_keys)
    companions = read_companions(Path(path))
    with torch.device("meta"):
        model = MiMo(config)
    model.companions = companions
    return filled_model(model, reader, dtype=dtype, device=device, weights=weights)


def filled_model(model: Model, reader: CheckpointReader, *, dtype: str, device: str, weights: str = "plain") -> Model:
    """Return a model on the meta device with the weights of a checkpoint; the other arguments as in `load_model`."""
    weights_dtype, weights_device = checked_dtype(dtype), resolve_device(device)
    weight_format, config = quantized_format(weights, reader.packing), model.config
    check_fit(model, reader)
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
    """Write a checkpoint that this package and transformers load. The write is atomic.

    Args:
        model: The model, plain or packed. Tensors keep their dtype.
        path: The folder. An existing checkpoint is replaced.
        tokenizer: Source of the tokenizer files, with chat template and stop tokens. None: the files of the folder from
            which the model was loaded, or else those in `path`.
        max_shard_bytes: Size limit of a file.

    Raises:
        CheckpointError: `path` has files that do not belong to a checkpoint, or the model is
            int8 or fp8.
        ConfigError: An argument has a wrong type or value.
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
    """Raise CheckpointError if `path` is a file or a folder with files that do not belong to a checkpoint."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; save to a new folder.")
    others = _other_files(path) if path.is_dir() else []
    if others:
        raise CheckpointError(f"{path} holds {others[0]}, which is not part of a checkpoint; save to a new folder.")


def _other_files(folder: Path) -> list[str]:
    """Return the names in a folder that do not belong to a checkpoint."""
    checkpoint_names = {"config.json", INDEX, CODEC_FOLDER, *(name.split("/")[0] for name in companion_names(folder))}
    return [
        path.name for path in folder.iterdir() if path.suffix != ".safetensors" and path.name not in checkpoint_names
    ]


def _packing_of(model: MiMo) -> Packing | None:
    """Return the format of the packed weights; None without any. Raises CheckpointError for int8 and fp8 weights."""
    packing = None
    for name, module in model.named_modules():
        for part in module.blocks if isinstance(module, QuantizableModule) else ():
            assert isinstance(module, QuantizableModule)
            weight = module.held_weight(part)
            if not isinstance(weight, Packed) or packing not in (None, weight.packing):
                raise CheckpointError(
                    f"{name}.{part} is held as {format_of(weight)}, and a quantized model cannot be saved unless all "
                    "weights have one packed format. Load it with weights='plain', or write an FP8 checkpoint with "
                    "`openmimo convert`."
                )
            packing = weight.packing
    return packing


def packed_entry(packing: Packing) -> dict[str, Any]:
    """Return the entry of `config.json` that states how weights are packed."""
    return {
        "quantization_config": {
            "quant_method": "openmimo_packed",
            "format": packing.format,
            "stages": packing.stages,
            "scales": "row" if packing.per_row else "tensor",
        }
    }


def write_model(
    model: MiMo,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    entries: list[Entry] | None = None,
) -> None:
    """Write the files of `save_model` to an existing folder; the caller makes the write atomic.

    Args:
        model: The model.
        folder: The folder.
        tokenizer: As in `save_model`.
        max_shard_bytes: As in `save_model`.
        entries: The tensors (None: those of the model, which this process holds whole).
    """
    packing = _packing_of(model)
    if entries is None:
        entries = [entry for slot in slots(model) for entry in slot.entries()]
    write_description(model, folder, tokenizer=tokenizer, extra=packed_entry(packing) if packing else {})
    write_shards(folder, entries, max_shard_bytes=max_shard_bytes)


def write_description(
    model: MiMo, folder: Path, *, tokenizer: Tokenizer | None = None, extra: dict[str, Any] | None = None
) -> None:
    """Write `config.json`, with the entries of `extra`, and the tokenizer files of a model to an existing folder."""
    companions = model.companions if tokenizer is None else tokenizer.companions
    if model.is_extended:
        companions = companions.with_max_length(model.config.max_positions)
    if companions.files:
        companions.write(folder)
    dtype = str(model.model.embed_tokens.dtype).removeprefix("torch.")
    _write_json(model.config_keys(config_to_hf(model.config, dtype=dtype)) | (extra or {}), folder)


def write_config(
    config: ModelConfig, folder: Path, *, dtype: str = "float32", extra: dict[str, Any] | None = None
) -> None:
    """Write `config.json` only."""
    _write_json(config_to_hf(config, dtype=dtype) | (extra or {}), folder)


def _write_json(values: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def open_checkpoint(folder: Path, window_keys: int | None) -> tuple[ModelConfig, CheckpointReader]:
    """Return the config and an open reader of a checkpoint folder; the number of MTP heads is that of the weights.

    The folder may be one of peft's that holds a LoRA adapter; the reader then merges it into the weights of its base.

    Raises:
        CheckpointError: A file is missing or damaged, or config.json has more layers, more experts or another number of
            MTP heads than the weights. If the weights have no MTP head at all, a warning is printed instead.
        ConfigError: config.json is not valid.
    """
    recover_folder(folder)
    given, folder = folder, base_folder(require_folder(folder))
    path = file_in_folder(folder, "config.json")
    if path is None:
        raise CheckpointError(f"{folder} holds no config.json; a checkpoint is a folder with config.json and weights.")
    values = read_json(path)
    config = config_from_hf(values, where=str(path), window_keys=window_keys)
    packed = packed_config(values, str(path))
    packing = Packing(packed.format, packed.stages, packed.scales == "row") if packed else None
    reader = CheckpointReader(folder, None if folder == given else Adapter(given), packing)
    names = reader.names()
    heads = count_mtp_heads(names, config)
    stated = values.get("num_nextn_predict_layers")
    if stated and not heads:
        _warn_once(f"{path} states {stated} MTP heads, but the weights hold none; the model has no MTP heads.")
    elif stated is not None and stated != heads:
        raise CheckpointError(
            f"{path} states {stated} MTP heads (num_nextn_predict_layers), but the weights hold {heads}. "
            f"Set it to {heads} if that is right."
        )
    _check_counts(config, names, path)
    return config_from_hf(values, where=str(path), window_keys=window_keys, num_mtp_heads=heads), reader


def _check_counts(config: ModelConfig, names: set[str], path: Path) -> None:
    """Refuse a config.json with more layers or experts than the weights, before a model of that size is built."""
    stated = {"num_hidden_layers": len(config.layers)}
    numbers = {"num_hidden_layers": r"model\.layers\.(\d{1,9})\."}
    if config.moe is not None:
        stated["n_routed_experts"] = config.moe.num_experts
        numbers["n_routed_experts"] = r"model\.layers\.\d+\.mlp\.experts\.(\d{1,9})\."
    for key, pattern in numbers.items():
        indices = {int(match[1]) for name in names if (match := re.match(pattern, name))}
        if stated[key] > max(indices, default=-1) + 1:
            raise CheckpointError(
                f"{path}: {key} is {stated[key]}, but the weights hold {max(indices, default=-1) + 1}."
            )


@functools.cache
def _warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def check_fit(model: MiMo, reader: CheckpointReader) -> None:
    """Compare the tensors of the model with the files' headers, and a stored output head with tied embeddings.

    Raises:
        CheckpointError: One error with all tensors that are missing, unexpected, misshaped or unreadable.
    """
    expected = {slot.name: tuple(slot.target.shape) for slot in slots(model)}
    found = reader.names()
    if model.config.tie_embeddings and "lm_head.weight" in found:  # some programs store it although it is tied
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
    if reader.adapter is not None:
        reader.adapter.check({name: tuple(reader.shape(name, model.config)) for name in present})


def _check_tied(reader: CheckpointReader, config: ModelConfig) -> None:
    """Refuse tied embeddings if the checkpoint has an output head with other values."""
    if not config.tie_embeddings or "lm_head.weight" not in reader.names():
        return
    head, embedding = (reader.read(name, config) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if not torch.equal(head.float(), embedding.float()):
        raise CheckpointError(
            f"{reader.folder} has tie_word_embeddings true in its config.json, but an lm_head.weight that differs from "
            "model.embed_tokens.weight. Set it to false, or remove the tensor."
        )


def _check_path(path: str | Path) -> None:
    """Raise ConfigError if `path` cannot be the path of a folder."""
    if not isinstance(path, (str, Path)):
        raise ConfigError(f"path is {path!r}, a {type(path).__name__}; give the path of a checkpoint folder.")
    if not str(path) or "\0" in str(path):
        raise ConfigError(f"path is {str(path)!r}; give the path of a checkpoint folder.")


def checked_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name. Raises ConfigError if it is none of `DTYPES`."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


_MIMO_7B_MTP_NAMES = {
    "enorm": "token_layernorm",
    "hnorm": "hidden_layernorm",
    "eh_proj": "input_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Slot:
    """The part of the model that corresponds to one checkpoint tensor.

    Attributes:
        name: The name of the tensor in the checkpoint.
        target: The view of the parameter or buffer that it fills (a meta tensor on a meta model).
        swaps_halves: Whether the checkpoint stores the two column halves in the opposite order.
        is_router: Whether the tensor is float32 independent of the model's dtype.
    """

    name: str
    target: Weight
    swaps_halves: bool = False
    is_router: bool = False

    def from_checkpoint(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert a checkpoint tensor to the layout of the model; the conversion is its own inverse."""
        return torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1) if self.swaps_halves else tensor

    def fill(self, weight: Weight) -> None:
        """Copy a weight of the checkpoint to the target, in the format of the target."""
        copy_weight(
            self.target, self.from_checkpoint(dequantized(weight, torch.float32)) if self.swaps_halves else weight
        )

    def entries(self) -> list[Entry]:
        """Return the tensors to store in the checkpoint. The target must be plain or packed.

        Raises:
            CheckpointError: The target is packed and the checkpoint has another order of columns.
        """
        if isinstance(self.target, Packed):
            packed = self.target
            if self.swaps_halves:
                raise CheckpointError(
                    f"{self.name} has another order of columns in the checkpoint; it cannot be packed."
                )
            return packed_entries(self.name, packed.packing, packed.matrix_shape, lambda: packed)
        return [Entry(self.name, tuple(self.target.shape), self.plain_target.dtype, self.to_checkpoint)]

    def to_checkpoint(self) -> torch.Tensor:
        """Return the tensor to store in the checkpoint. The target must be plain."""
        return self.from_checkpoint(self.plain_target)

    @property
    def plain_target(self) -> torch.Tensor:
        """The target of a model that is not quantized."""
        assert isinstance(self.target, torch.Tensor)
        return self.target


def slots(model: MiMo) -> Iterator[Slot]:
    """Yield every checkpoint tensor of the model, in checkpoint order by module. Works on a meta-device model."""
    tied = model.config.tie_embeddings
    for name, tensor in model.state_dict(keep_vars=False).items():
        weight = entry_weight(model, name, tensor)
        if weight is None or (tied and name == "lm_head.weight"):
            continue
        if name.endswith(".experts.gate_up_proj"):
            yield from _gate_up_slots(name, weight)
        elif name.endswith(".experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down_DF in enumerate(unbind(weight)):
                yield Slot(f"{prefix}{expert}.down_proj.weight", down_DF)
        elif model.config.family == "mimo" and name.startswith("model.mtp."):
            yield _mimo_7b_mtp_slot(name, weight)
        else:
            yield Slot(name, weight, is_router=".mlp.gate." in name)


def _gate_up_slots(name: str, weight_EHD: Weight) -> Iterator[Slot]:
    prefix, half = name.removesuffix("gate_up_proj"), weight_EHD.shape[1] // 2
    for expert, gate_up_HD in enumerate(unbind(weight_EHD)):
        yield Slot(f"{prefix}{expert}.gate_proj.weight", rows_of(gate_up_HD, 0, half))
        yield Slot(f"{prefix}{expert}.up_proj.weight", rows_of(gate_up_HD, half, 2 * half))


def _mimo_7b_mtp_slot(name: str, tensor: Weight) -> Slot:
    head, part, *rest = name.removeprefix("model.mtp.layers.").split(".")
    hub_name = ".".join(["model.mtp_layers", head, _MIMO_7B_MTP_NAMES.get(part, part), *rest])
    return Slot(hub_name, tensor, swaps_halves=part == "eh_proj")


def count_mtp_heads(names: set[str], config: ModelConfig) -> int:
    """Return the number of MTP heads whose tensors a checkpoint has; the hub's config of V2-Flash does not state it."""
    prefix = "model.mtp_layers." if config.family == "mimo" else "model.mtp.layers."
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
