"""Configuration of an evaluation. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from openmimo.core.errors import ConfigError
from openmimo.core.fields import NonNegativeInt, PositiveInt, check_fields
from openmimo.engine.config import EngineConfig
from openmimo.model.embedded import EMBEDDED


@dataclass(frozen=True)
class EvalConfig:
    """Measure a checkpoint on a task at several context lengths.

    Attributes:
        path: A checkpoint folder with a tokenizer (if none is given: the built-in tiny model).
        task: A file in `openmimo/evals/tasks`, or `package.module:Object`.
        lengths: Tokens of an example, including question and answer.
        examples: Examples per length.
        seed: Determines the examples.
        batch: Examples per decoding batch.
        device: auto, cpu, or a device of torch.
        dtype: Of weights and activations.
        options: Settings of the task.
        engine: Batching, cache and drafting.
        output: JSON file for the scores (None: print only).
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")] = EMBEDDED
    task: str = "needle"
    lengths: tuple[PositiveInt, ...] = (128, 256, 512, 1024)
    examples: PositiveInt = 64
    seed: NonNegativeInt = 0
    batch: PositiveInt = 16
    device: str = "auto"
    dtype: str = "float32"
    options: dict[str, int | float | str | bool] = field(default_factory=dict)
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = EngineConfig(mixed_prefill_tokens=1024)
    output: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "EvalConfig")
        if not self.lengths:
            raise ConfigError("EvalConfig.lengths is empty; give at least one length.")
