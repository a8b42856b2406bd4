"""Runs evaluation tasks at several lengths with greedy decoding, and prints and writes the scores.

Examples are answered in batches. In a run folder, each answer is a line of `metrics.jsonl`, so a stopped run goes on
after the last line.
"""

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from openmimo.core.config import from_dict, keep_config, run_folder, to_dict
from openmimo.core.errors import ConfigError, DataError, UserError
from openmimo.core.files import write_text_atomic
from openmimo.core.metrics import MetricsWriter, TimeLeft, read_metrics
from openmimo.data.task import final_answer
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.llm import LLM
from openmimo.evals.config import EvalConfig
from openmimo.evals.models import Answerer, Endpoint, LocalModel
from openmimo.evals.results import Answered, Results, answered, score_table, summarize, write_report
from openmimo.evals.suites import SUITES, Entry
from openmimo.evals.task import TASKS, Example, Room, Score, Task
from openmimo.evals.text_loss import measure, measure_last, text_windows
from openmimo.model.audio.language_config import is_audio_folder
from openmimo.model.config import ModelConfig
from openmimo.model.hf import load_config

_BATCH_TOKENS = 1 << 18
_TRIED_LENGTH = 1 << 14  # every task fits into longer prompts, which take seconds to make
_FREE = ("run_folder", "device", "examples", "lengths", "batch", "output")
Done = Mapping[tuple[str, int, int], Answered]


@dataclass(frozen=True)
class Cell:
    """One task at one length."""

    entry: Entry
    task: Task
    options: Any
    room: Room
    num_examples: int

    def example(self, seed: int, index: int) -> Example:
        """Example number `index`: a pure function of its arguments."""
        return self.task.example(self.options, self.room, (seed, self.room.length, index))


def run(config: EvalConfig, llm: LLM) -> list[Score]:
    """The score of `config.task` at each length. The same config gives the same examples.

    Raises:
        UserError: A length does not fit the model or the task (checked first), or the engine fails.
    """
    _check_lengths(config, llm.model.config)
    assert llm.tokenizer is not None, "an evaluation needs a tokenizer"
    cells = plan(config, llm.tokenizer, config.lengths)
    return summarize(answer_all(config, cells, LocalModel(llm)), {}).scores[config.task]


def plan(config: EvalConfig, tokenizer: Tokenizer, lengths: tuple[int, ...]) -> list[Cell]:
    """The tasks and lengths of an evaluation. In a suite, lengths that are too short for a task are left out.

    Raises:
        UserError: A task or its options are wrong, or a length is too short for the only task.
    """
    if config.suite is None:
        entries: tuple[Entry, ...] = (Entry(config.task, config.task, config.options),)
    else:
        entries = SUITES[config.suite].entries
    cells = []
    for entry in entries:
        task = TASKS.get(entry.task)
        options: Any = from_dict(task.options, dict(entry.options), where=f"options of task {entry.task!r}")
        most = config.examples if task.num_examples is None else min(config.examples, task.num_examples(options))
        for length in sorted(set(lengths)):
            cell = Cell(entry, task, options, Room(tokenizer, length, config.form), most)
            if _fits(cell, config):
                cells.append(cell)
    if not cells:
        raise ConfigError(f"None of the tasks of suite {config.suite!r} fits into {max(lengths)} tokens.")
    return cells


def _fits(cell: Cell, config: EvalConfig) -> bool:
    if cell.room.length > _TRIED_LENGTH:
        return True
    try:
        cell.example(config.seed, 0)
    except DataError:
        if config.suite is None:
            raise
        return False
    return True


def answer_all(
    config: EvalConfig,
    cells: list[Cell],
    model: Answerer,
    *,
    done: Done | None = None,
    keep: Callable[[Answered], None] | None = None,
) -> Iterator[Answered]:
    """Yield every example with its score.

    Args:
        config: Seed and batch size.
        cells: Tasks and lengths.
        model: What answers.
        done: Examples that were finished before, by label, length and index.
        keep: Called with each new one.
    """
    done = done or {}
    total = sum(cell.room.length * cell.num_examples for cell in cells)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("tokens", total=total)
        time_left = TimeLeft(2)
        for cell in cells:
            progress.update(bar, description=f"{cell.entry.label} {cell.room.length}")
            keys = [(cell.entry.label, cell.room.length, index) for index in range(cell.num_examples)]
            finished = [done[key] for key in keys if key in done]
            total -= cell.room.length * len(finished)
            progress.advance(bar, cell.room.length * len(finished))
            yield from finished
            waiting = [key[2] for key in keys if key not in done]
            size = max(min(config.batch, _BATCH_TOKENS // cell.room.length), 1)
            for start in range(0, len(waiting), size):
                batch, started = waiting[start : start + size], time.perf_counter()
                for one in _answer_batch(config, cell, model, batch):
                    if keep is not None:
                        keep(one)
                    yield one
                num_tokens = cell.room.length * len(batch)
                total -= num_tokens
                progress.advance(bar, num_tokens)
                if said := time_left.after_step(time.perf_counter() - started, num_tokens, total):
                    progress.console.print(said)


def _answer_batch(config: EvalConfig, cell: Cell, model: Answerer, indices: list[int]) -> Iterator[Answered]:
    examples = [cell.example(config.seed, index) for index in indices]
    try:
        texts = model.answers(cell.room, examples)
    except UserError as error:
        raise UserError(f"{cell.entry.label} at {cell.room.length} tokens: {error}") from error
    for index, example, text in zip(indices, examples, texts, strict=True):
        answer = final_answer(text) if config.form == "chat" else text
        score, metrics = cell.task.score(example, answer), cell.task.metrics(example, answer)
        yield Answered(cell.entry.label, cell.room.length, index, score, example.depth, metrics, text)


def is_audio(config: EvalConfig) -> bool:
    """Return whether the task or the suite is one of audio models. Imports no task."""
    folder = Path(__file__).parent / "audio" / "tasks"
    return config.suite == "speech" or (config.suite is None and (folder / f"{config.task}.py").is_file())


def run_and_print(config: EvalConfig) -> None:
    """`openmimo eval`: loads the checkpoint, measures it, prints a table, and writes files if configured."""
    if config.engine_check:
        from openmimo.evals.engine_check import check_and_print

        check_and_print(config)
        return
    if config.text is None and is_audio(config):
        from openmimo.evals.audio.runner import run_audio

        run_audio(config)
        return
    if config.base_url is None and is_audio_folder(config.path):
        raise ConfigError(f"{config.path} is an audio model; give --suite speech, or a --task of audio models.")
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise ConfigError(f"EvalConfig.output is {config.output!r}, but its folder does not exist; create it first.")
    tokenizer = Tokenizer.load(config.path)
    if config.text is not None:
        _measure_text(config, tokenizer)
        return
    lengths = _lengths(config, None if config.base_url else load_config(config.path))
    cells = plan(config, tokenizer, lengths)
    _say_what_is_left_out(config, cells, lengths)
    with _kept_folder(config) as folder:
        results = _measured(config, cells, folder, tokenizer)
        title = f"{config.suite or config.task} on {config.base_url or config.path}"
        _print_scores(config, results, title)
        _write(config, {"version": TASKS.get(cells[0].entry.task).version} | results.as_json(), folder)
        if folder is not None:
            Console(stderr=True).print(f"report: {write_report(results, title, folder)}", soft_wrap=True)


def _say_what_is_left_out(config: EvalConfig, cells: list[Cell], lengths: tuple[int, ...]) -> None:
    """Print the tasks of a suite that do not fit into some of the lengths."""
    if config.suite is None:
        return
    for length in sorted(set(lengths)):
        planned = {cell.entry.label for cell in cells if cell.room.length == length}
        missing = [entry.label for entry in SUITES[config.suite].entries if entry.label not in planned]
        if missing:
            Console(stderr=True).print(f"{length} tokens are too few for {', '.join(missing)}.", soft_wrap=True)


def _measured(config: EvalConfig, cells: list[Cell], folder: Path | None, tokenizer: Tokenizer) -> Results:
    """Answer what is not finished."""
    means = SUITES[config.suite].means if config.suite else {}
    model: Answerer
    if config.base_url is not None:
        model = Endpoint(config.base_url, config.model)
    else:
        model = LocalModel(LLM(config.path, tokenizer, engine=config.engine, device=config.device, dtype=config.dtype))
    if folder is None:
        return summarize(answer_all(config, cells, model), means)
    writer = MetricsWriter(folder)
    writer.truncate_after(sys.maxsize)  # removes an unfinished last line
    rows = read_metrics(writer.path) if writer.path.exists() else []
    versions = {cell.entry.label: cell.task.version for cell in cells}
    finished = [answered(row) for row in rows if row["version"] == versions.get(row["label"])]
    steps = itertools.count(len(rows) + 1)

    def keep(one: Answered) -> None:
        writer.write(next(steps), one.row() | {"version": versions[one.label]})

    done = {(one.label, one.length, one.index): one for one in finished}
    return summarize(answer_all(config, cells, model, done=done, keep=keep), means)


@contextlib.contextmanager
def _kept_folder(config: EvalConfig) -> Iterator[Path | None]:
    """The run folder with the config in it, or None."""
    if config.run_folder is None:
        yield None
        return
    folder = Path(config.run_folder)
    with run_folder(folder):
        keep_config(config, folder, free=_FREE, traces=("metrics.jsonl",))
        yield folder


def _measure_text(config: EvalConfig, tokenizer: Tokenizer) -> None:
    model = load_config(config.path)
    if config.window is not None and config.window > model.max_positions:
        raise ConfigError(f"--window is {config.window}, but the model has {model.max_positions} positions.")
    windows = text_windows(config, tokenizer, model.max_positions)
    llm = LLM(config.path, tokenizer, engine=config.engine, device=config.device, dtype=config.dtype)
    report = Console(stderr=True).print
    if config.last_tokens:
        losses = measure_last(windows, config.last_tokens, llm.score, tokenizer, report)
        places = [str(loss.first) for loss in losses]
        column = f"tokens before the last {config.last_tokens}"
    else:
        losses = measure(windows, llm.score, tokenizer, report)
        places = [*(f"{loss.first} to {loss.last}" for loss in losses[:-1]), "all"]
        column = "positions"
    table = Table(column, "tokens", "nats per token", "bits per byte", title=f"{config.text} on {config.path}")
    for place, loss in zip(places, losses, strict=True):
        table.add_row(place, str(loss.tokens), f"{loss.nats_per_token:.4f}", f"{loss.bits_per_byte:.4f}")
    Console().print(table)
    _write(config, {"losses": to_dict(losses)}, None)


def _print_scores(config: EvalConfig, results: Results, title: str) -> None:
    """Print a line for each length of a single task, or a table of tasks and lengths."""
    if config.suite is not None:
        Console().print(score_table(results, title))
        return
    metrics = results.metrics[config.task]
    names = list(dict.fromkeys(name for by_name in metrics.values() for name in by_name))
    table = Table("tokens", "examples", "score", "95 % interval", *names, title=title)
    for score in results.scores[config.task]:
        others = [f"{metrics[score.length][name]:.3f}" if name in metrics[score.length] else "-" for name in names]
        interval = f"{score.low:.3f} to {score.high:.3f}"
        table.add_row(str(score.length), str(score.examples), f"{score.mean:.3f}", interval, *others)
    Console().print(table)


def _write(config: EvalConfig, results: dict[str, Any], folder: Path | None) -> None:
    text = json.dumps({"config": to_dict(config)} | results, indent=2) + "\n"
    if config.output is not None:
        write_text_atomic(Path(config.output), text)
    if folder is not None:
        write_text_atomic(folder / "scores.json", text)


def _lengths(config: EvalConfig, model: ModelConfig | None) -> tuple[int, ...]:
    """The lengths to measure: those of the suite that the model has positions for, unless others are given."""
    if config.suite is None or config.lengths != EvalConfig.lengths:
        if model is not None:
            _check_lengths(config, model)
        return config.lengths
    lengths = SUITES[config.suite].lengths
    fitting = tuple(length for length in lengths if model is None or length <= model.max_positions)
    if not fitting:
        assert model is not None
        raise ConfigError(
            f"Suite {config.suite!r} begins at {lengths[0]} tokens, but the model has {model.max_positions} positions. "
            "Give shorter --lengths, or --suite tiny."
        )
    return fitting


def _check_lengths(config: EvalConfig, model: ModelConfig) -> None:
    fitting = [length for length in config.lengths if length <= model.max_positions]
    if len(fitting) < len(config.lengths):
        advice = f"--lengths {' '.join(map(str, fitting))}" if fitting else "shorter --lengths"
        raise ConfigError(
            f"--lengths includes {max(config.lengths)} tokens, but the model has {model.max_positions} positions; "
            f"give {advice}."
        )
