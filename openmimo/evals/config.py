"""Configuration of an evaluation. Imports no torch."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated

import tyro

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeInt, PositiveInt, check_fields
from openmimo.engine.config import EngineConfig
from openmimo.model.embedded import EMBEDDED


@dataclass(frozen=True)
class EvalConfig:
    """Measure a checkpoint on a task at several context lengths, or its loss on your own text.

    Attributes:
        path: A checkpoint folder with a tokenizer (default: the built-in tiny model).
        text: Measure the loss on these texts in place of a task: a text file, a .jsonl or .parquet file, or a folder of
            one of these kinds; .gz and .zst also.
        text_field: Key (.jsonl) or column (.parquet) of the text (None: text).
        text_tokens: Tokens of the text that are measured at most (0: all).
        window: Tokens that the model reads at once (None: as many as it has positions, at most 2048).
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
    text: str | None = None
    text_field: str | None = None
    text_tokens: NonNegativeInt = 100_000
    window: Annotated[int, Bounds(least=2)] | None = None
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
        unused = _TASK_ONLY if self.text is not None else _TEXT_ONLY
        for field_ in fields(self):
            default = field_.default_factory() if field_.default_factory is not MISSING else field_.default
            if field_.name in unused and getattr(self, field_.name) != default:
                option = f"--{field_.name.replace('_', '-')}"
                raise ConfigError(f"{option} has no effect {'with' if self.text is not None else 'without'} --text.")


_TASK_ONLY = ("task", "lengths", "examples", "seed", "batch", "options")
_TEXT_ONLY = ("text_field", "text_tokens", "window")
