"""Merge fine-tuned checkpoints by arithmetic on their weights: the baseline of multi-teacher distillation."""

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from openmimo.core.errors import ConfigError
from openmimo.core.files import new_folder_atomic
from openmimo.data.tokenizer_files import read_companions
from openmimo.model.config import ModelConfig
from openmimo.model.hf import check_fit, open_checkpoint, slots, write_config
from openmimo.model.hf_files import DEFAULT_SHARD_BYTES, CheckpointReader, Entry, write_shards
from openmimo.model.mimo import MiMo

Method = Literal["average", "task_arithmetic"]


def merge(base: str, children: list[str], destination: str, *, method: Method = "average", scale: float = 1.0) -> Path:
    """Merge fine-tuned `children` of `base` into the new folder `destination` and return its path.

    The tensors are float32 and are streamed: at most one shard is in memory. Tokenizer and chat template are copied
    from the base.

    Args:
        base: Folder of the checkpoint from which the children were fine-tuned.
        children: Folders of the fine-tuned checkpoints.
        destination: New folder.
        method: "average": base + scale * mean of the children's changes (the mean of the children for scale 1).
            "task_arithmetic": base + scale * sum of the changes (arXiv 2212.04089).
        scale: Factor of the changes.

    Raises:
        UserError: There are no children, the scale is not finite, the destination exists, or a child is another model
            than the base. No tensor has been read.
    """
    path = Path(destination)
    if method not in ("average", "task_arithmetic"):
        raise ConfigError(f"method is {method!r}; it must be 'average' or 'task_arithmetic'.")
    if not children:
        raise ConfigError("merge needs at least one child, a checkpoint that was fine-tuned from the base.")
    if not math.isfinite(scale):
        raise ConfigError(f"scale is {scale}; it must be a finite number.")
    if path.exists():
        raise ConfigError(f"{path} already exists; give a new folder for the merged model.")
    config, reader = open_checkpoint(Path(base), None)
    companions = read_companions(Path(base))
    with torch.device("meta"):
        model = MiMo(config)
    check_fit(model, reader)
    readers = [_child_reader(child, model, base) for child in children]
    share = scale / len(children) if method == "average" else scale

    def merged(name: str) -> torch.Tensor:
        start = reader.read(name, config).float()
        changes = (child.read(name, config).float() - start for child in readers)
        return start.clone().add_(sum(changes), alpha=share)

    entries = [
        Entry(slot.name, tuple(slot.target.shape), torch.float32, functools.partial(merged, slot.name))
        for slot in slots(model)
    ]
    with new_folder_atomic(path) as folder:
        companions.write(folder)
        write_config(config, folder, dtype="float32")
        write_shards(folder, entries, max_shard_bytes=DEFAULT_SHARD_BYTES)
    Console(stderr=True).print(f"model   {path}")
    return path


def _child_reader(child: str, model: MiMo, base: str) -> CheckpointReader:
    """Open the weights of a child. Raises ConfigError if its config.json describes another model than the base."""
    config, reader = open_checkpoint(Path(child), None)
    if _geometry(config) != _geometry(model.config):
        base_fields, child_fields = vars(_geometry(model.config)), vars(_geometry(config))
        changed = [name for name in base_fields if base_fields[name] != child_fields[name]]
        raise ConfigError(f"{child} is another model than {base}: their config.json differ in {', '.join(changed)}.")
    check_fit(model, reader)
    return reader


def _geometry(config: ModelConfig) -> ModelConfig:
    """Return the config without the fields that affect neither the meaning of the weights nor their shape."""
    return replace(config, token_ids={}, init_std=0.0)
