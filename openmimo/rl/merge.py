"""Merging checkpoints by their weights alone: what distillation has to beat to be worth its rollouts."""

from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from openmimo.core.errors import ConfigError
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import load_model, save_model

Method = Literal["average", "task_arithmetic"]


@torch.no_grad()
def merge(base: str, children: list[str], destination: str, *, method: Method = "average", scale: float = 1.0) -> Path:
    """Writes the merge of fine-tuned `children` of `base` to `destination`, and returns its path.

    average: base + scale times the mean of the children's changes (scale 1: the mean of the children). task_arithmetic:
    base + scale times their sum (2212.04089). Raises ConfigError for no children, or children of another shape.
    """
    if not children:
        raise ConfigError("merge needs at least one checkpoint beside the base.")
    merged = load_model(base, dtype="float32")
    start = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    share = scale / len(children) if method == "average" else scale
    for child in children:
        for name, tensor in load_model(child, dtype="float32").state_dict().items():
            if name not in start or start[name].shape != tensor.shape:
                raise ConfigError(f"{child} has {name} of shape {tuple(tensor.shape)}; {base} has no such tensor.")
            merged.state_dict()[name].add_(tensor - start[name], alpha=share)
    save_model(merged, destination)
    Tokenizer.load(Path(base)).save(Path(destination))
    Console(stderr=True).print(f"model   {destination}")
    return Path(destination)
