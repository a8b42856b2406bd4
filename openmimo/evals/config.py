"""Configuration of an evaluation. Imports no torch."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Literal

import tyro

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeInt, PositiveInt, check_fields
from openmimo.engine.config import EngineConfig
from openmimo.model.embedded import EMBEDDED


@dataclass(frozen=True)
class EvalConfig:
    """Measure a checkpoint or a server on tasks at several context lengths, or its loss on your own text.

    Attributes:
        path: A checkpoint folder with a tokenizer (default: the built-in tiny model). With --base-url, the
            tokenizer that counts the prompts.
        text: Measure the loss on these texts in place of a task: a text file, a .jsonl or .parquet file, or a folder of
            one of these kinds; .gz and .zst also.
        text_field: Key (.jsonl) or column (.parquet) of the text (None: text).
        text_tokens: Tokens of the text that are measured at most (0: all).
        window: Tokens that the model reads at once (None: as many as it has positions, at most 2048).
        last_tokens: Measure the loss of the same last tokens of every window after contexts of 512, 1024, ... tokens
            (0: measure all tokens by position).
        suite: Measure several tasks: ruler, long, tiny (on token ids, for models too small to read English), or speech
            (of an audio model).
        task: A file in `openmimo/evals/tasks` or, of an audio model, in `openmimo/evals/audio/tasks`; or
            `package.module:Object`.
        lengths: Tokens of an example, including question and answer (a suite has its own, up to the model's positions).
        examples: Examples per length.
        seed: Determines the examples.
        form: base: the model continues the prompt; chat: the prompt is a conversation in the chat template.
        batch: Examples per decoding batch, and requests to a server at once.
        base_url: Measure the model behind an OpenAI-compatible API, such as http://localhost:8000/v1. The environment
            variable OPENAI_API_KEY may have its key.
        model: Name of the model at --base-url (None: the first that the server lists).
        run_folder: Folder for every answer, tables and pictures. The same command goes on after the last answer.
        engine_check: Compare the engine with whole passes of the model at one length, in place of a task. It needs no
            trained weights.
        length: Tokens of the engine check.
        device: auto, cpu, or a device of torch.
        dtype: Of weights and activations.
        options: Settings of the task; with --suite speech, of every task, such as `voices FOLDER`.
        engine: Batching, cache and drafting.
        output: JSON file for the scores (None: print only).
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")] = EMBEDDED
    text: str | None = None
    text_field: str | None = None
    text_tokens: NonNegativeInt = 100_000
    window: Annotated[int, Bounds(least=2)] | None = None
    last_tokens: NonNegativeInt = 0
    suite: Literal["ruler", "long", "tiny", "speech"] | None = None
    task: str = "needle"
    lengths: tuple[PositiveInt, ...] = (128, 256, 512, 1024)
    examples: PositiveInt = 64
    seed: NonNegativeInt = 0
    form: Literal["base", "chat"] = "base"
    batch: PositiveInt = 16
    base_url: str | None = None
    model: str | None = None
    run_folder: str | None = None
    engine_check: bool = False
    length: Annotated[int, Bounds(least=64)] = 4096
    device: str = "auto"
    dtype: str = "float32"
    options: dict[str, int | float | str | bool] = field(default_factory=dict)
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = EngineConfig(mixed_prefill_tokens=1024)
    output: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "EvalConfig")
        if not self.lengths:
            raise ConfigError("EvalConfig.lengths is empty; give at least one length.")
        given = [one.name for one in fields(self) if getattr(self, one.name) != _default(self, one.name)]
        kinds = [kind for kind in ("text", "suite", "engine_check") if kind in given]
        if len(kinds) > 1:
            raise ConfigError(f"{_option(kinds[0])} and {_option(kinds[1])} exclude each other; give one of them.")
        kind = kinds[0] if kinds else "task"
        for name in given:
            if name == "options" and self.suite == "speech":
                continue
            if kind not in _HAS_EFFECT_WITH.get(name, (kind,)):
                raise ConfigError(f"{_option(name)} has no effect {_without_or_with(name, kind)}.")
        if self.base_url is None and self.model is not None:
            raise ConfigError("--model has no effect without --base-url.")
        if self.base_url is not None:
            if self.path == EMBEDDED:
                raise ConfigError("--base-url needs PATH, a folder with the tokenizer of the server's model.")
            for name in ("device", "dtype", "engine"):
                if name in given:
                    raise ConfigError(f"{_option(name)} has no effect with --base-url; the server decides.")
            if not self.base_url.startswith(("http://", "https://")):
                raise ConfigError(f"--base-url is {self.base_url!r}; it must begin with http:// or https://.")


_TASKS = ("task", "suite")
_HAS_EFFECT_WITH = {
    **dict.fromkeys(("task", "options"), ("task",)),
    **dict.fromkeys(("lengths", "examples", "batch", "form", "base_url", "model", "run_folder"), _TASKS),
    **dict.fromkeys(("text_field", "text_tokens", "window", "last_tokens"), ("text",)),
    "seed": (*_TASKS, "engine_check"),
    "length": ("engine_check",),
    "output": ("task", "suite", "text"),
}


def _default(config: EvalConfig, name: str) -> object:
    one = config.__dataclass_fields__[name]
    return one.default_factory() if one.default_factory is not MISSING else one.default


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _without_or_with(name: str, kind: str) -> str:
    needed = _HAS_EFFECT_WITH[name]
    return f"with {_option(kind)}" if "task" in needed else f"without {_option(needed[0])}"
