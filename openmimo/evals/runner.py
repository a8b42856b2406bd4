"""Runs an evaluation task at several lengths with greedy decoding, and prints the scores."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from openmimo.core.config import from_dict, to_dict
from openmimo.core.errors import ConfigError, UserError
from openmimo.core.files import write_text_atomic
from openmimo.core.metrics import TimeLeft
from openmimo.core.records import SamplingParams
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.llm import LLM
from openmimo.evals.config import EvalConfig
from openmimo.evals.task import TASKS, Example, Score, Task, wilson_interval
from openmimo.evals.text_loss import TextLoss, measure, text_windows
from openmimo.model.config import ModelConfig
from openmimo.model.hf import load_config


def run(config: EvalConfig, llm: LLM) -> list[Score]:
    """The score at each length. The same config gives the same examples.

    Raises:
        UserError: A length does not fit the model or the task (checked first), or the engine fails.
    """
    task = TASKS.get(config.task)
    _check_lengths(config, llm.model.config)
    for length in config.lengths:
        next(examples_of(config, task, llm, length))
    progress = _Progress(sum(config.lengths) * config.examples)
    return [_score_length(config, task, llm, length, progress) for length in config.lengths]


def examples_of(config: EvalConfig, task: Task, llm: LLM, length: int) -> Iterator[Example]:
    """The examples of one length: pure functions of the seed and their index."""
    assert llm.tokenizer is not None, "an evaluation needs a tokenizer"
    options: Any = from_dict(task.options, config.options, where=f"options of task {config.task!r}")
    for index in range(config.examples):
        yield task.example(options, llm.tokenizer, length, np.random.default_rng((config.seed, length, index)))


def run_and_print(config: EvalConfig) -> None:
    """`openmimo eval`: loads the checkpoint, measures it, prints a table, and writes JSON if configured."""
    tokenizer = Tokenizer.load(config.path)
    model = load_config(config.path)
    windows = None
    if config.text is None:
        _check_lengths(config, model)
    elif config.window is not None and config.window > model.max_positions:
        raise ConfigError(f"--window is {config.window}, but the model has {model.max_positions} positions.")
    else:
        windows = text_windows(config, tokenizer, model.max_positions)
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise ConfigError(f"EvalConfig.output is {config.output!r}, but its folder does not exist; create it first.")
    llm = LLM(config.path, tokenizer, engine=config.engine, device=config.device, dtype=config.dtype)
    if windows is not None:
        _print_losses(config, measure(windows, llm.score, tokenizer, Console(stderr=True).print))
        return
    scores = run(config, llm)
    table = Table("tokens", "examples", "score", "95 % interval", title=f"{config.task} on {config.path}")
    for score in scores:
        table.add_row(
            str(score.length), str(score.examples), f"{score.mean:.3f}", f"{score.low:.3f} to {score.high:.3f}"
        )
    Console().print(table)
    _write(config, {"version": TASKS.get(config.task).version, "scores": to_dict(scores)})


def _print_losses(config: EvalConfig, losses: list[TextLoss]) -> None:
    table = Table("positions", "tokens", "nats per token", "bits per byte", title=f"{config.text} on {config.path}")
    *parts, total = losses
    for loss in parts:
        table.add_row(
            f"{loss.first} to {loss.last}", str(loss.tokens), f"{loss.nats_per_token:.4f}", f"{loss.bits_per_byte:.4f}"
        )
    table.add_row("all", str(total.tokens), f"{total.nats_per_token:.4f}", f"{total.bits_per_byte:.4f}")
    Console().print(table)
    _write(config, {"losses": to_dict(losses)})


def _write(config: EvalConfig, results: dict[str, Any]) -> None:
    if config.output is not None:
        text = json.dumps({"config": to_dict(config)} | results, indent=2)
        write_text_atomic(Path(config.output), text + "\n")


def _check_lengths(config: EvalConfig, model: ModelConfig) -> None:
    fitting = [length for length in config.lengths if length <= model.max_positions]
    if len(fitting) < len(config.lengths):
        advice = f"--lengths {' '.join(map(str, fitting))}" if fitting else "shorter --lengths"
        raise ConfigError(
            f"--lengths includes {max(config.lengths)} tokens, but the model has {model.max_positions} positions; "
            f"give {advice}."
        )


class _Progress:
    """Prints once how long the rest takes, if that is long. Work is measured in tokens."""

    def __init__(self, num_tokens: int):
        self._tokens_left = num_tokens
        self._time_left = TimeLeft(2)
        self._started = time.perf_counter()

    def add(self, num_tokens: int) -> None:
        """Record tokens that were processed since the last call."""
        now = time.perf_counter()
        self._tokens_left -= num_tokens
        if said := self._time_left.after_step(now - self._started, num_tokens, self._tokens_left):
            Console(stderr=True).print(said)
        self._started = now


def _score_length(config: EvalConfig, task: Task, llm: LLM, length: int, progress: _Progress) -> Score:
    examples = list(examples_of(config, task, llm, length))
    starts = range(0, len(examples), config.batch)
    total = 0.0
    for start in track(starts, description=f"{config.task} {length}", console=Console(stderr=True), transient=True):
        batch = examples[start : start + config.batch]
        params = [
            SamplingParams(max_tokens=len(example.answer_ids), temperature=0.0, ignore_eos=True) for example in batch
        ]
        completions = llm.generate([example.prompt_ids for example in batch], params)
        failed = next((completion for completion in completions if completion.error), None)
        if failed is not None:
            raise UserError(f"{config.task} at {length} tokens: {failed.error}.")
        total += sum(
            task.score(example, completion.token_ids) for example, completion in zip(batch, completions, strict=True)
        )
        progress.add(length * len(batch))
    mean = total / len(examples)
    return Score(length, len(examples), mean, *wilson_interval(mean, len(examples)))
