"""The files of a tokenizer's training checkpoint: the tokenizer as a folder of its own, and the rest of the state."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from openmimo.core import config as config_io
from openmimo.model.audio.checkpoint import write_weights
from openmimo.model.audio.tokenizer import AudioTokenizer
from openmimo.model.hf_files import umask_mode
from openmimo.train.checkpoint import Progress

_STATE = "optimizer.safetensors"  # the name that `train.checkpoint.find_damage` requires
_TOKENIZER = "tokenizer."


def write_state(
    folder: Path, modules: nn.Module, optimizers: Sequence[torch.optim.Optimizer], progress: Progress
) -> None:
    """Write a checkpoint to an existing folder; the caller makes the write atomic."""
    tokenizer = modules.get_submodule(_TOKENIZER.rstrip("."))
    assert isinstance(tokenizer, AudioTokenizer)
    write_weights(tokenizer, tokenizer.config, folder)
    tensors = {name: tensor.contiguous() for name, tensor in modules.state_dict().items()}
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in modules.named_parameters()}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            tensors |= {f"optimizer/{names[parameter]}/{key}": value.contiguous() for key, value in values.items()}
    (folder / "trainer").mkdir()
    with umask_mode(folder / "trainer" / _STATE):
        save_file(tensors, folder / "trainer" / _STATE)
    config_io.save(progress, folder / "trainer" / "progress.json")


def load_state(folder: Path, modules: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Fill modules and optimizers from an intact checkpoint. Returns its step."""
    tensors = load_file(folder / "trainer" / _STATE)
    states = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer/")}
    modules.load_state_dict(tensors)
    parameters = dict(modules.named_parameters())
    owners = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, value in states.items():
        _, parameter_name, key = name.split("/")
        parameter = parameters[parameter_name]
        owners[parameter].state[parameter][key] = value if key == "step" else value.to(parameter.device)
    return config_io.load(Progress, folder / "trainer" / "progress.json").step
