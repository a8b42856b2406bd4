"""`openmimo chain`: from random weights to the student of several teachers, in pieces of a few minutes on one device.

The parts are runs of the commands pretrain, extend, sft, rl and mopd, then short runs that measure the gap of trainer
and engine, and the comparison of all models. After `minutes` the command ends: the current step is finished and its
checkpoint written, as after SIGTERM. The same command goes on from there, and computes what one without a limit
computes.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from openmimo.core import config as config_io
from openmimo.core.config import run_folder
from openmimo.core.errors import ConfigError, Interrupted, terminable
from openmimo.core.metrics import read_metrics
from openmimo.demo.config import ChainConfig
from openmimo.demo.parts import Parts
from openmimo.rl.compare import compare
from openmimo.rl.config import RlConfig
from openmimo.rl.run import train
from openmimo.runtime.report import Report
from openmimo.train.config import check_path
from openmimo.train.pretrain import extend, pretrain, sft

GAP = ("mismatch_k1", "mismatch_k3", "extreme_ratio_share_2", "logprob_difference_max")


def run(config: ChainConfig) -> Path | None:
    """Run the parts that have no result yet. Returns the path of the report; None if the time was over before.

    Raises:
        ConfigError: The folder contains results of another config.
    """
    console = Console()
    folder = Path(config.folder)
    check_path(config.folder, "folder")
    _check_config(config, folder)
    with run_folder(folder):
        config_io.save(replace(config, minutes=0.0), folder / "config.json")
        limit = _Limit()
        try:
            with _ended_by(limit, config.minutes):
                return _all_parts(config, folder, console)
        except Interrupted as interrupt:
            if not limit.is_over:
                raise
            kept = interrupt.kept or "finished parts are kept. The same command continues from there."
            console.print(f"stopped after {config.minutes:g} minutes: {kept}", soft_wrap=True, highlight=False)
            return None


def _all_parts(config: ChainConfig, folder: Path, console: Console) -> Path:
    parts = Parts(folder, console, {}, "")
    stages = (
        ("pretrain", lambda: _path(pretrain(config.pretrain))),
        ("extend", lambda: _path(extend(config.extend))),
        ("sft", lambda: _path(sft(config.sft))),
        *(
            (f"teacher_{_domain(teacher)}", lambda teacher=teacher: _path(train(teacher)))
            for teacher in config.teachers
        ),
        ("mopd", lambda: _path(train(config.mopd))),
        *((f"gap_{name}", lambda own=own: _measured(own)) for name, own in gap_runs(config).items()),
    )
    for number, (name, work) in enumerate(stages, start=1):
        parts.run(name, f"{number}/{len(stages) + 1}  {name}", work)
    cells = parts.run("compare", f"{len(stages) + 1}/{len(stages) + 1}  compare", lambda: _compared(config))
    gaps = {name: _gap(own) for name, own in gap_runs(config).items()}
    return _report(config, folder, cells, gaps, parts.seconds(), console)


def gap_runs(config: ChainConfig) -> dict[str, RlConfig]:
    """Return short runs from the fine-tuned model, with the engine's routes in the trainer (R3) and without."""
    first = config.teachers[0]
    short = replace(first, steps=config.gap_steps, updates_per_step=1, warmup_steps=0)
    return {
        name: replace(short, replay_routing=replay, run_folder=f"{config.folder}/gap_{name}")
        for name, replay in (("with_r3", True), ("without_r3", False))
    }


def speeds(run: Path) -> dict[str, float]:
    """Return tokens per second of rollouts and updates of a run of RL, and the share of time of the rollouts.

    Rollout tokens are those that the policy wrote; update tokens are those of whole samples.
    """
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "seconds/rollout" in row]
    rollout, update = (sum(row[f"seconds/{name}"] for row in rows) for name in ("rollout", "update"))
    written = sum(row["samples"] * row.get("answer_tokens/mean", 0.0) for row in rows)
    return {
        "rollout": written / rollout if rollout else 0.0,
        "update": written / update if update else 0.0,
        "rollout_share": rollout / (rollout + update) if rollout + update else 0.0,
    }


def _path(model: Path) -> dict[str, Any]:
    return {"model": str(model)}


def _domain(config: RlConfig) -> str:
    return "_".join(source.name for source in config.sources)


def _measured(config: RlConfig) -> dict[str, Any]:
    return _path(train(config)) | _gap(config)


def _gap(config: RlConfig) -> dict[str, float]:
    """Return the means of the gap over the steps of a run that learned."""
    rows = [row for row in read_metrics(Path(config.run_folder) / "metrics.jsonl") if GAP[0] in row]
    return {name: sum(row[name] for row in rows) / len(rows) for name in GAP} if rows else {}


def _compared(config: ChainConfig) -> dict[str, Any]:
    return {name: {domain: vars(cell) for domain, cell in row.items()} for name, row in compare(config.compare).items()}


def _report(
    config: ChainConfig,
    folder: Path,
    cells: dict[str, Any],
    gaps: dict[str, dict[str, float]],
    seconds: dict[str, float],
    console: Console,
) -> Path:
    domains = [source.name for source in config.compare.sources]
    rewards = [[name, *(_cell(row[domain]) for domain in domains)] for name, row in cells.items()]
    gap_rows = [[name, *(f"{gap[metric]:.3g}" if gap else "" for metric in GAP)] for name, gap in gaps.items()]
    runs = {_domain(own): own for own in config.teachers} | {"mopd": config.mopd}
    speed_rows = []
    for name, own in runs.items():
        speed = speeds(Path(own.run_folder))
        speed_rows.append(
            [name, f"{speed['rollout']:,.0f}", f"{speed['update']:,.0f}", f"{speed['rollout_share']:.0%}"]
        )
    tables: list[tuple[str, list[str], list[list[Any]]]] = [
        ("Mean reward (share of the teacher's lead; v: worse than the base)", ["model", *domains], rewards),
        ("Gap of trainer and engine", ["run", *GAP], gap_rows),
        ("Written tokens a second", ["run", "rollouts", "updates", "time of rollouts"], speed_rows),
        ("Seconds of the last piece of each part", ["part", "seconds"], [[n, f"{s:.0f}"] for n, s in seconds.items()]),
    ]
    report = Report(f"openmimo chain {folder.name}")
    for title, header, rows in tables:
        report.heading(title)
        report.table(header, rows)
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    path = report.write(folder / "report.html")
    console.print(f"finished. report  {path}", soft_wrap=True)
    return path


def _cell(cell: dict[str, Any]) -> str:
    share = cell["recovered"]
    lead = f" ({share:.0%})" if share is not None and share == share else ""
    return f"{cell['mean']:.3f}{lead}{' v' if cell['regressed'] else ''}"


def _check_config(config: ChainConfig, folder: Path) -> None:
    path = folder / "config.json"
    if path.exists() and config_io.load(ChainConfig, path) != replace(config, minutes=0.0):
        raise ConfigError(f"{folder} contains a chain with other settings; name another --folder, or remove it.")


class _Limit:
    """Whether the time is over."""

    is_over = False


@contextmanager
def _ended_by(limit: _Limit, minutes: float) -> Iterator[None]:
    """Send SIGTERM to this process after some minutes, which ends a run after its step and a checkpoint."""

    def end(number: int, frame: object) -> None:
        limit.is_over = True
        os.kill(os.getpid(), signal.SIGTERM)

    with terminable():
        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
