"""The options of `openmimo plan`, without torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeInt, PositiveInt, check_fields


@dataclass(frozen=True)
class PlanConfig:
    """Predict memory, messages and time of a recipe's training step on accelerators, and search the meshes.

    Attributes:
        recipe: A recipe, or FILE.py:FUNCTION, that returns a pre-training config.
        gpus: Number of accelerators.
        gpu: Their kind.
        stage: Index of the recipe's stage.
        micro_batch_size: Rows of a micro-batch of one process.
        recompute: Recompute activations in the backward pass.
        longest: Print the longest row that all cards together can train on with each option of `activations`, instead
            of the meshes. Each card holds a part of the row (cp) and of the weights.
        efficiency: Fraction of the card's peak at which the products of a step run.
        top: Number of meshes to print.
        dry_run: Also build the shards of every rank of the best mesh on the meta device, and check their shapes.
    """

    recipe: tyro.conf.Positional[str] = "flash_309b"
    gpus: PositiveInt = 256
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    stage: NonNegativeInt = 0
    micro_batch_size: PositiveInt = 1
    recompute: bool = True
    efficiency: Annotated[float, Bounds(above=0, most=1)] = 0.4
    top: PositiveInt = 8
    dry_run: bool = False
    longest: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "plan")
        if self.longest and self.dry_run:
            raise ConfigError("dry_run has no effect with longest, which searches no meshes; leave one of them out.")
