"""Count the checkpoint tensors and the parameters of an audio language model without allocating it."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from openmimo.model.audio.language import AudioLanguageModel
from openmimo.model.audio.language_config import AUDIO_PRESETS, AudioModelConfig, is_audio_folder
from openmimo.model.hf import slots

_BACKBONE = ("model.", "lm_head.")


@dataclass(frozen=True)
class AudioAudit:
    """Counts of a model.

    Attributes:
        shapes: Shape of every checkpoint tensor by name.
        backbone: Parameters of the text model.
        extra: All other parameters.
    """

    shapes: dict[str, tuple[int, ...]]
    backbone: int
    extra: int


def is_audio_model(name_or_path: str) -> bool:
    """Return whether a name is a preset of an audio language model, or a path leads to the config of one."""
    path = Path(name_or_path)
    return name_or_path in AUDIO_PRESETS or is_audio_folder(path.parent if path.name == "config.json" else path)


def audit_audio(config: AudioModelConfig) -> AudioAudit:
    """Count a model on the meta device."""
    with torch.device("meta"):
        model = AudioLanguageModel(config)
    shapes = {slot.name: tuple(slot.target.shape) for slot in slots(model)}
    backbone = sum(prod(shape) for name, shape in shapes.items() if name.startswith(_BACKBONE))
    return AudioAudit(shapes, backbone, sum(map(prod, shapes.values())) - backbone)


def print_audio_audit(result: AudioAudit, *, list_tensors: bool) -> None:
    """Print the counts, after the name and shape of every tensor if `list_tensors`."""
    if list_tensors:
        for name, shape in sorted(result.shapes.items()):
            print(f"{name}\t{list(shape)}")
    table = Table("what", "count", box=None)
    table.add_row("tensors", f"{len(result.shapes):,}")
    table.add_row("parameters of the text model", f"{result.backbone:,}")
    table.add_row("parameters of patch encoder and patch decoder", f"{result.extra:,}")
    Console().print(table)
