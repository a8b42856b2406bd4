"""Merging checkpoints by their weights alone: what distillation has to beat to be worth its rollouts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from openmimo.core.errors import ConfigError
from openmimo.core.files import new_folder_atomic
from openmimo.data.companions import read_companions
from openmimo.model.config import ModelConfig
from openmimo.model.hf import check_fit, open_checkpoint, write_config
from openmimo.model.hf_names import slots
from openmimo.model.hf_reader import CheckpointReader
from openmimo.model.hf_writer import DEFAULT_SHARD_BYTES, Entry, write_shards
from openmimo.model.mimo import MiMo

Method = Literal["average", "task_arithmetic"]


def merge(base: str, children: list[str], destination: str, *, method: Method = "average", scale: float = 1.0) -> Path:
    """Writes the merge of fine-tuned `children` of `base` to `destination`, in float32, and returns its path.

    average: base + scale times the mean of the children's changes (scale 1: the mean of the children). task_arithmetic:
    base + scale times their sum (2212.04089). Tokenizer and chat template are those of the base. The tensors are
    streamed: at most one shard is in memory. Raises UserError, before a tensor is read, for no children, a scale that
    is not finite, a destination that exists, and children that are other models than the base.
    """
    path = Path(destination)
    if method not in ("average", "task_arithmetic"):
        raise ConfigError(f"method is {method!r}; it must be 'average' or 'task_arithmetic'.")
    if not children:
        raise ConfigError("merge needs at least one child, a checkpoint that was fine-tuned from the base.")
    if not math.isfinite(scale):
        raise ConfigError(f"scale is {scale}; it must be a finite number.")
    if path.exists():
        raise ConfigError(f"{path} exists already; name a new folder for the merged model.")
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
        Entry(slot.name, tuple(slot.target.shape), torch.float32, lambda name=slot.name: merged(name))
        for slot in slots(model)
    ]
    with new_folder_atomic(path) as folder:
        companions.write(folder)
        write_config(config, folder, dtype="float32")
        write_shards(folder, entries, max_shard_bytes=DEFAULT_SHARD_BYTES)
    Console(stderr=True).print(f"model   {path}")
    return path


def _child_reader(child: str, model: MiMo, base: str) -> CheckpointReader:
    """The open weights of a child whose config.json describes the base's model."""
    config, reader = open_checkpoint(Path(child), None)
    if _geometry(config) != _geometry(model.config):
        before, now = vars(_geometry(model.config)), vars(_geometry(config))
        changed = [name for name in before if before[name] != now[name]]
        raise ConfigError(f"{child} is another model than {base}: their config.json differ in {', '.join(changed)}.")
    check_fit(model, reader)
    return reader


def _geometry(config: ModelConfig) -> ModelConfig:
    """A config without what changes neither the weights' meaning nor their shape."""
    return replace(config, token_ids={}, init_std=0.0)
