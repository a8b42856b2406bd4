"""The see-saw report: the mean reward of each student in each domain, against the base and the domain's teacher.

Training in one domain tends to lower rewards in others. For each domain the report shows which share of the teacher's
lead over the base a student has (headroom recovered), and whether a student is significantly worse than the base.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from openmimo.core.config import run_folder
from openmimo.core.errors import ConfigError
from openmimo.core.files import write_text_atomic
from openmimo.core.metrics import TimeLeft, bootstrap_interval
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.model.hf import load_model
from openmimo.rl.config import CompareConfig
from openmimo.rl.evaluate import evaluate_policy
from openmimo.runtime.device import resolve_device
from openmimo.runtime.report import Report, new_figure
from openmimo.train.config import check_path

_MIN_HEADROOM = 0.05


@dataclass(frozen=True)
class Cell:
    """The result of one model in one domain, over problems and seeds.

    Attributes:
        mean: The mean reward.
        low: The lower end of its 95 % interval.
        high: The upper end.
        recovered: The share of the teacher's lead over the base; NaN where that lead is below 0.05.
        regressed: Whether the 95 % interval of the difference from the base is below zero.
    """

    mean: float
    low: float
    high: float
    recovered: float
    regressed: bool


def compare(config: CompareConfig, *, console: Console | None = None) -> dict[str, dict[str, Cell]]:
    """Evaluate all models, write `report.html` and `results.json` into the run folder, and print the table.

    Returns:
        The cells by model and domain.

    Raises:
        ConfigError: A checkpoint does not exist, or a teacher is not among the models.
    """
    console = console or Console()
    check_path(config.run_folder, "run_folder")
    if config.threads:
        torch.set_num_threads(config.threads)
    models = {"base": (config.base,), **config.models}
    unknown = sorted(set(config.teachers.values()) - set(models))
    if unknown:
        raise ConfigError(f"teachers name {', '.join(unknown)}, which is not among the models: {', '.join(models)}.")
    missing = [path for paths in models.values() for path in paths if not (Path(path) / "config.json").exists()]
    if missing:
        raise ConfigError(f"there is no checkpoint in {', '.join(missing)}.")
    folder = Path(config.run_folder)
    with run_folder(folder):
        return _compare(config, models, folder, console)


def _compare(
    config: CompareConfig, models: dict[str, tuple[str, ...]], folder: Path, console: Console
) -> dict[str, dict[str, Cell]]:
    rewards: dict[str, list[dict[str, list[float]]]] = {name: [] for name in models}
    checkpoints = [(name, path) for name, paths in models.items() for path in paths]
    time_left = TimeLeft(1, warm_up=0)
    bar = track(checkpoints, description="evaluating", console=Console(stderr=True), transient=True)
    for number, (name, checkpoint) in enumerate(bar, start=1):
        started = time.perf_counter()
        rewards[name].append(_rewards(config, checkpoint, console))
        if said := time_left.after_step(time.perf_counter() - started, 1, len(checkpoints) - number):
            console.print(said)
    cells = {name: _cells(config, rewards, name) for name in models}
    write_text_atomic(folder / "results.json", json.dumps({"rewards": rewards}, indent=1) + "\n")
    _print(console, config, cells)
    path = _report(config, cells).write(folder / "report.html")
    console.print(f"report  {path}")
    return cells


def _rewards(config: CompareConfig, path: str, console: Console) -> dict[str, list[float]]:
    """By domain, the reward of each held-out problem. Prints a warning about those without a reward."""
    model = load_model(path, dtype="float32", device=str(resolve_device(config.device)))
    engine = Engine(model, Tokenizer.load(Path(path)), config.engine)
    evaluation = evaluate_policy(
        engine, config.sources, problems=config.problems, seed=config.seed, temperature=config.temperature,
        thinking=config.thinking,
    )  # fmt: skip
    for text in evaluation.failures().values():
        console.print(f"[yellow]warning:[/] {escape(f'{path}: {text}')}", highlight=False)
    return evaluation.rewards


def _cells(config: CompareConfig, rewards: dict[str, list[dict[str, list[float]]]], name: str) -> dict[str, Cell]:
    cells = {}
    for source in config.sources:
        domain = source.name
        model = _over_seeds(rewards[name], domain)
        base = _over_seeds(rewards["base"], domain)
        teacher = _over_seeds(rewards[config.teachers.get(domain, "base")], domain)
        headroom = _mean(teacher) - _mean(base)
        recovered = (_mean(model) - _mean(base)) / headroom if headroom >= _MIN_HEADROOM else float("nan")
        change = bootstrap_interval([after - before for after, before in zip(model, base, strict=True)])
        cells[domain] = Cell(_mean(model), *bootstrap_interval(model), recovered, change[1] < 0)
    return cells


def _over_seeds(runs: list[dict[str, list[float]]], domain: str) -> list[float]:
    """The mean over seeds of each problem's reward. All models have the same problems, so differences are paired."""
    return [_mean(values) for values in zip(*(run[domain] for run in runs), strict=True)]


def _print(console: Console, config: CompareConfig, cells: dict[str, dict[str, Cell]]) -> None:
    table = Table("model", *(source.name for source in config.sources), title="mean reward (headroom recovered)")
    for name, row in cells.items():
        table.add_row(name, *(_shown(cell) for cell in row.values()))
    console.print(table)
    console.print("▼: worse than the base, beyond chance (95 %)", highlight=False)


def _shown(cell: Cell) -> str:
    recovered = "" if cell.recovered != cell.recovered else f" ({cell.recovered:.0%})"
    return f"{cell.mean:.3f}{recovered}{' ▼' if cell.regressed else ''}"


def _report(config: CompareConfig, cells: dict[str, dict[str, Cell]]) -> Report:
    report = Report("The see-saw: every student in every domain")
    report.paragraph(
        f"{config.problems} held-out problems of each domain, the same for all models, at temperature "
        f"{config.temperature:g}. Bars: 95 % bootstrap intervals over problems; seeds of a method are averaged. "
        "In brackets: the share of the teacher's lead over the base. ▼: worse than the base beyond chance."
    )
    report.figure(seesaw_figure(config, cells), "Mean reward by domain and model; each domain's teacher is hatched.")
    report.table(*seesaw_table(config, cells))
    names = [source.name for source in config.sources]
    intervals = [[name, *(f"{row[d].low:.3f} to {row[d].high:.3f}" for d in names)] for name, row in cells.items()]
    report.heading("95 % intervals")
    report.table(["model", *names], intervals)
    return report


def seesaw_table(config: CompareConfig, cells: dict[str, dict[str, Cell]]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: the mean of each model in each domain, with the headroom recovered."""
    names = [source.name for source in config.sources]
    return ["model", *names], [[name, *(_shown(row[domain]) for domain in names)] for name, row in cells.items()]


def seesaw_figure(config: CompareConfig, cells: dict[str, dict[str, Cell]]) -> Any:
    """A matplotlib figure with a bar and its interval for each model and domain."""
    figure, axis = new_figure(width=max(8.5, 1.1 * len(cells)), height=4.2)
    from matplotlib import colormaps  # after new_figure has chosen a backend without a display

    colors = colormaps["tab10" if len(cells) <= 10 else "tab20"]
    width = 0.8 / len(cells)
    for index, (name, row) in enumerate(cells.items()):
        for number, source in enumerate(config.sources):
            cell = row[source.name]
            axis.bar(
                number + (index + 0.5) * width - 0.4, cell.mean, width, color=colors(index % 20),
                yerr=[[max(0.0, cell.mean - cell.low)], [max(0.0, cell.high - cell.mean)]],
                hatch="//" if config.teachers.get(source.name) == name else None,
                label=name if number == 0 else None, error_kw={"linewidth": 0.8},
            )  # fmt: skip
    axis.set_xticks(range(len(config.sources)), [source.name for source in config.sources])
    axis.set(ylabel="mean reward", ylim=(0, 1.02))
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))
