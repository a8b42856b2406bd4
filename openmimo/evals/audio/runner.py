"""Runs audio tasks on an audio model, and prints and writes the results.

In a run folder, each answer is a line of `metrics.jsonl`, so a stopped run goes on after the last line, and the sounds
of the first examples are files of `sounds`.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from openmimo.core.config import from_dict, keep_config, run_folder, to_dict
from openmimo.core.errors import ConfigError
from openmimo.core.files import write_text_atomic
from openmimo.core.metrics import MetricsWriter, read_metrics
from openmimo.data.audio.files import SAMPLE_RATE, write_audio
from openmimo.evals.audio.measures import fraction_interval
from openmimo.evals.audio.models import AudioAnswerer
from openmimo.evals.audio.task import AUDIO_TASKS, SCORE, SHARES, Answer, AudioExample, Fraction, Measures, OpenTask
from openmimo.evals.config import EvalConfig
from openmimo.evals.suites import SPEECH_SUITE, Entry

_KEPT_SOUNDS = 8
_WITHOUT_EFFECT = ("lengths", "form", "batch")
_FREE = ("run_folder", "device", "examples", "output")


@dataclass(frozen=True)
class AudioAnswered:
    """One finished example.

    Attributes:
        label: The line of the suite.
        index: Number of the example.
        measures: Of the model's answer.
        reference: Of the reference: what the judge allows.
        shuffled: Of the reference of the next example: what an answer reaches by chance.
        text: The text of the answer.
    """

    label: str
    index: int
    measures: Measures
    reference: Measures
    shuffled: Measures
    text: str


@dataclass(frozen=True)
class Measured:
    """One measure over all examples of a task, with its 95 % interval.

    Attributes:
        reference: The measure of the references.
        chance: Its value without understanding.
    """

    task: str
    measure: str
    examples: int
    value: float
    low: float
    high: float
    reference: float
    chance: float


def answer_task(
    label: str,
    task: OpenTask,
    model: AudioAnswerer,
    indices: Iterable[int],
    *,
    seed: int = 0,
    hear: Callable[[AudioExample, Answer, int], None] | None = None,
) -> Iterator[AudioAnswered]:
    """Yield the examples of a task with their measures.

    Args:
        label: The line of the suite.
        task: The task.
        model: What answers.
        indices: Numbers of the examples.
        seed: Seed of the model's sounds.
        hear: Called with each example, the model's answer, and the number of the example.
    """
    for index in indices:
        example = task.example(index)
        answer = model.answer(example, seed + index)
        if hear is not None:
            hear(example, answer, index)
        yield AudioAnswered(
            label,
            index,
            measures=task.measures(example, answer),
            reference=task.measures(example, example.reference),
            shuffled=task.measures(example, task.example(_next(index, task)).reference),
            text=answer.text,
        )


def _next(index: int, task: OpenTask) -> int:
    return index + 1 if task.num_examples is None else (index + 1) % task.num_examples


def summarize(label: str, task: OpenTask, answered: Sequence[AudioAnswered]) -> list[Measured]:
    """Return every measure of a task. The score has the task's own chance if the task states one."""
    found = []
    for name in dict.fromkeys(name for one in answered for name in one.measures):
        found_by_model = [one.measures[name] for one in answered if name in one.measures]
        value, low, high = fraction_interval(found_by_model, is_share=name in SHARES)
        reference = _whole(one.reference.get(name) for one in answered)
        chance = _whole(one.shuffled.get(name) for one in answered)
        if name == SCORE and task.chance is not None:
            chance = task.chance
        found.append(Measured(label, name, len(answered), value, low, high, reference, chance))
    return found


def _whole(fractions: Iterable[Fraction | None]) -> float:
    return fraction_interval([fraction for fraction in fractions if fraction is not None])[0]


def run_audio(config: EvalConfig) -> None:
    """`openmimo eval` with an audio task or the suite speech: load the model, measure it, print and write the results.

    Raises:
        UserError: An argument or the model is invalid.
    """
    if config.base_url is not None:
        raise ConfigError("Audio tasks measure the checkpoint at PATH; leave out --base-url.")
    for name in _WITHOUT_EFFECT:
        if getattr(config, name) != getattr(EvalConfig, name):
            raise ConfigError(f"--{name} has no effect with audio tasks; leave it out.")
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise ConfigError(f"EvalConfig.output is {config.output!r}, but its folder does not exist; create it first.")
    if config.suite == "speech":
        entries = tuple(replace(entry, options={**entry.options, **config.options}) for entry in SPEECH_SUITE)
    else:
        entries = (Entry(config.task, config.task, config.options),)
    tasks = [(entry, _opened(entry, config.seed)) for entry in entries]
    model = _loaded(config)
    if config.run_folder is None:
        _print_and_write(config, tasks, _measure(config, tasks, model, None), None)
        return
    folder = Path(config.run_folder)
    with run_folder(folder):
        keep_config(config, folder, free=_FREE, traces=("metrics.jsonl",))
        _print_and_write(config, tasks, _measure(config, tasks, model, folder), folder)


def _loaded(config: EvalConfig) -> AudioAnswerer:
    from openmimo.engine.audio.engine import AudioEngine
    from openmimo.evals.audio.models import LocalAudioModel
    from openmimo.model.audio.language_config import is_audio_folder
    from openmimo.runtime.device import resolve_device

    if not is_audio_folder(config.path):
        raise ConfigError(f"{config.path} is no audio model, which {config.suite or config.task} needs.")
    return LocalAudioModel(AudioEngine(config.path, device=str(resolve_device(config.device)), dtype=config.dtype))


def _opened(entry: Entry, seed: int) -> OpenTask:
    task = AUDIO_TASKS.get(entry.task)
    options: Any = from_dict(task.options, dict(entry.options), where=f"options of task {entry.task!r}")
    return task.open(options, seed)


def _measure(
    config: EvalConfig, tasks: Sequence[tuple[Entry, OpenTask]], model: AudioAnswerer, folder: Path | None
) -> list[Measured]:
    writer = None if folder is None else MetricsWriter(folder)
    rows: list[dict[str, Any]] = []
    if writer is not None:
        writer.truncate_after(sys.maxsize)  # removes an unfinished last line
        rows = read_metrics(writer.path) if writer.path.exists() else []
    steps = itertools.count(len(rows) + 1)
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for entry, task in tasks:
            count = config.examples if task.num_examples is None else min(config.examples, task.num_examples)
            version = AUDIO_TASKS.get(entry.task).version
            done = [_answered(row) for row in rows if row["label"] == entry.label and row["version"] == version]
            done = [one for one in done if one.index < count]
            left = [index for index in range(count) if index not in {one.index for one in done}]
            bar = progress.add_task(entry.label, total=count, completed=len(done))
            for one in answer_task(entry.label, task, model, left, seed=config.seed, hear=_keeper(entry.label, folder)):
                if writer is not None:
                    writer.write(next(steps), {**_row(one), "version": version})
                done.append(one)
                progress.advance(bar)
            results += summarize(entry.label, task, done)
    return results


def _keeper(label: str, folder: Path | None) -> Callable[[AudioExample, Answer, int], None] | None:
    """A function that writes the sounds of the first examples."""
    if folder is None:
        return None

    def keep(example: AudioExample, answer: Answer, index: int) -> None:
        for kind, one in (("answer", answer), ("reference", example.reference)):
            if index < _KEPT_SOUNDS and one.sound is not None and len(one.sound.waveform):
                (folder / "sounds").mkdir(exist_ok=True)
                write_audio(folder / "sounds" / f"{label}_{index}_{kind}.wav", one.sound.waveform, SAMPLE_RATE)

    return keep


def _row(one: AudioAnswered) -> dict[str, Any]:
    row: dict[str, Any] = {"label": one.label, "index": one.index, "text": one.text}
    for kind in ("measures", "reference", "shuffled"):
        for name, (value, count) in getattr(one, kind).items():
            row[f"{kind}/{name}"], row[f"{kind}/{name}/of"] = value, count
    return row


def _answered(row: Mapping[str, Any]) -> AudioAnswered:
    kinds: dict[str, dict[str, Fraction]] = {"measures": {}, "reference": {}, "shuffled": {}}
    for key, value in row.items():
        kind, _, name = key.partition("/")
        if kind in kinds and not name.endswith("/of"):
            kinds[kind][name] = (value, row[f"{key}/of"])
    return AudioAnswered(row["label"], row["index"], **kinds, text=row.get("text", ""))


def _table(results: list[Measured], title: str) -> Table:
    """A line for each measure; the task is named in its first line."""
    table = Table("task", "measure", "value and 95 % interval", "reference", "chance", title=title)
    named: set[str] = set()
    for one in results:
        label = "" if one.task in named else f"{one.task} ({one.examples})"
        named.add(one.task)
        value = f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"
        table.add_row(label, one.measure, value, f"{one.reference:.3f}", f"{one.chance:.3f}")
    return table


def _print_and_write(
    config: EvalConfig, tasks: Sequence[tuple[Entry, OpenTask]], results: list[Measured], folder: Path | None
) -> None:
    judges = {entry.label: task.judge for entry, task in tasks}
    console = Console()
    console.print(_table(results, f"{config.suite or config.task} on {config.path}"))
    for label, judge in judges.items():
        console.print(f"judge of {label}: {judge}", soft_wrap=True)
    values = [{**asdict(one), "judge": judges[one.task]} for one in results]
    text = json.dumps({"config": to_dict(config), "results": values}, indent=2) + "\n"
    if config.output is not None:
        write_text_atomic(Path(config.output), text)
    if folder is not None:
        write_text_atomic(folder / "scores.json", text)
