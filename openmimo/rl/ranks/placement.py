"""Where the teachers of a distillation run on several devices are."""

import os
from pathlib import Path

import torch

from openmimo.model.hf import load_config
from openmimo.model.mimo import MiMo
from openmimo.rl.config import MopdConfig, RlConfig
from openmimo.rl.teaching.teachers import SELF
from openmimo.runtime.device import free_memory_bytes

_SHARE_OF_MEMORY = 0.25  # the rest is for student, optimizer, gradients, activations and the engine's copy
_BYTES_PER_PARAMETER = 4  # teachers are loaded in float32


def placement_of(config: RlConfig, device: torch.device, processes: int) -> str:
    """The placement that the config names, or with "auto" the first that fits: resident, spread or sharded.

    Args:
        config: The config of the run.
        device: The device of this process.
        processes: Processes of the run.
    """
    if not isinstance(config, MopdConfig) or config.teacher_placement != "auto":
        return config.teacher_placement if isinstance(config, MopdConfig) else "resident"
    if config.writer == "teacher":
        return "resident"  # engines need whole teachers
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if device.type == "cpu" else 1
    room = _SHARE_OF_MEMORY * free_memory_bytes(device) / sharing
    sizes = list(teacher_bytes(config).values())
    if sum(sizes) <= room:
        return "resident"
    most = max(sum(sizes[rank::processes]) for rank in range(processes))  # as `Teachers.owner`
    return "spread" if config.signal == "sampled" and most <= room else "sharded"


def teacher_bytes(config: MopdConfig) -> dict[Path, int]:
    """The bytes of the weights of each teacher by its folder; domains with the same checkpoint share one."""
    folders = [Path(config.checkpoint if path == SELF else path).resolve() for path in config.teachers.values()]
    return {folder: _BYTES_PER_PARAMETER * _num_parameters(folder) for folder in dict.fromkeys(folders)}


def _num_parameters(folder: Path) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MiMo(load_config(folder)).parameters())
