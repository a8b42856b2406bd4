"""The start and the end of a run: its folder and device; its final model, and a report of its `metrics.jsonl`.

The report shows losses, draft acceptance, expert load, speed, and loss by position.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from openmimo.core.config import check_same_run, keep_config, run_folder
from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.files import new_folder_atomic
from openmimo.core.metrics import read_metrics
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import check_replaceable, write_model
from openmimo.model.hf_files import Entry
from openmimo.model.mimo import MiMo
from openmimo.runtime.device import resolve_device, works_ahead
from openmimo.runtime.report import Report, length_axis, new_figure, step_axis
from openmimo.train.checkpoint import Checkpoints, find_damage
from openmimo.train.config import RunConfig

# Settings of every run that do not affect the weights: they may change when a run continues.
FREE = (
    "run_folder", "device", "threads", "tensorboard", "checkpoints.*", "evaluation.*", "optimizer.max_skipped_steps",
    "*.options.path", "*.options.test_path", "parallel.*", "activation_checkpointing", "activations.*",
)  # fmt: skip
_FILES = ("config.json", "model/config.json", "model/tokenizer.json", "report.html")


def use_device(config: RunConfig) -> torch.device:
    """Return the device of a run, and set the number of CPU threads. Raises ConfigError for what it cannot do."""
    device = resolve_device(config.device)
    if config.activations.offload and not works_ahead(device):
        raise ConfigError(
            f"activations.offload has no effect on device {str(device)!r}, whose memory is that of the host; leave it "
            "out."
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    return device


@contextlib.contextmanager
def held_run(
    config: RunConfig,
    checkpoints: Checkpoints,
    *,
    free: Sequence[str],
    growing: Sequence[str],
    traces: Sequence[str],
    console: Console,
) -> Iterator[Path | None]:
    """Hold the folder of a run, and save its config there. Yields its newest intact checkpoint (None: a new run).

    Args:
        config: The config of the run.
        checkpoints: The checkpoints of the run.
        free: Settings that may differ; see `keep_config`.
        growing: Settings that may rise; see `keep_config`.
        traces: Files that exist as soon as the run has begun; see `keep_config`.
        console: Console for the name of the checkpoint.
    """
    folder = Path(config.run_folder)
    with run_folder(folder):
        keep_config(config, folder, free=free, traces=traces, growing=growing)
        checkpoints.recover()
        newest = checkpoints.newest_intact()
        if newest is not None:
            console.print(f"continuing from {newest}", soft_wrap=True)
        yield newest


def has_finished(
    config: RunConfig, checkpoints: Checkpoints, *, steps: int, free: Sequence[str], console: Console
) -> bool:
    """Return whether the run of this config is finished and complete. Prints a message if it is.

    Args:
        config: The config of the run.
        checkpoints: The checkpoints of the run.
        steps: Total steps of the run.
        free: Settings that may differ; see `keep_config`.
        console: Console for the message.

    Raises:
        ConfigError: The folder contains another finished run.
    """
    folder = Path(config.run_folder)
    newest = checkpoints.newest()
    if newest is None or checkpoints.newest_step() != steps or not all((folder / name).exists() for name in _FILES):
        return False
    check_same_run(config, folder / "config.json", free=free)
    if not any((folder / "model").glob("*.safetensors")) or find_damage(newest) is not None:
        return False
    console.print(
        f"this run is finished: {steps} steps. Nothing was done; ask for more steps to continue it, or set another "
        "run_folder for a new run.",
        soft_wrap=True,
    )
    console.print(f"model   {folder / 'model'}\nreport  {folder / 'report.html'}", soft_wrap=True)
    return True


Rows = list[dict[str, Any]]


def write_outcome(
    model: MiMo,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    folder: Path,
    write_report: Callable[[Path], Path],
    console: Console,
    *,
    entries: list[Entry] | None = None,
) -> Path:
    """Write the model with its tokenizer (atomically) and the report of a run. Returns the folder of the model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        checkpoints: The checkpoints of the run.
        folder: The folder of the run.
        write_report: Writes the report of a run folder, and returns its path.
        console: Console for the paths.
        entries: The tensors to write (None: those of the model, which this process holds whole).

    Raises:
        CheckpointError: The model cannot be written (e.g. the disk is full), or its folder contains other files.
    """
    destination = folder / "model"
    check_replaceable(destination)
    try:
        with new_folder_atomic(destination) as unfinished:
            write_model(model, unfinished, tokenizer=tokenizer, entries=entries)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the model {destination} could not be written: {error}. {checkpoints.standing()} The same command "
            "continues from there."
        ) from error
    report = write_report(folder)
    console.print(f"model   {destination}\nreport  {report}", soft_wrap=True)
    for line in held_out_changes(read_metrics(folder / "metrics.jsonl")):
        console.print(line, highlight=False, soft_wrap=True)
    return destination


def held_out_changes(rows: Rows) -> list[str]:
    """The first and last value of each measurement on held-out data: the loss, or the mean reward of a source."""
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row):
        group, _, part = name.partition("/")
        values = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), float)]
        if len(values) > 1 and (name == "validation/main" or group == "evaluation"):
            what = "held-out loss" if group == "validation" else f"held-out reward of {part}"
            (first, before), (last, after) = values[0], values[-1]
            lines.append(f"{what}: {before:.3f} at step {first}, {after:.3f} at step {last}")
    return lines


_MAX_LINES = 8  # maximum number of layers with separate lines in one plot


def write_report(run_folder: Path) -> Path:
    """Write `report.html` in the run folder and return its path."""
    rows = read_metrics(run_folder / "metrics.jsonl")
    report = Report(f"openmimo run {run_folder.name}")
    add_training_figures(report, rows)
    report.heading("Configuration")
    report.code(json.dumps(json.loads((run_folder / "config.json").read_text()), indent=2))
    return report.write(run_folder / "report.html")


def add_training_figures(report: Report, rows: Rows) -> None:
    """Add plots and a table of a run's metrics to a report."""
    train = [row for row in rows if "loss/main" in row]
    validation = [row for row in rows if "validation/main" in row]
    report.heading("Loss")
    report.figure(
        _losses(train, validation, rows),
        "Cross-entropy in nats per token: training (lines), held-out data (dots). Dotted: stages.",
    )
    if validation and "validation/loss_by_position" in validation[-1]:
        report.figure(_by_position(validation), "Held-out loss by position in the document, first and last evaluation.")
    if validation and "validation/acceptance_0" in validation[-1]:
        report.heading("Multi-token prediction")
        report.figure(
            _acceptance(validation),
            "Share of held-out positions at which the draft of an MTP head is the model's own choice.",
        )
    if train and "expert_load/by_layer" in train[-1]:
        report.heading("Experts")
        report.figure(
            _expert_load(train), "Maximum over mean expert load by layer over time, and the load of the last step."
        )
    report.heading("Optimization and speed")
    report.figure(_speed(train), "Learning rate, gradient norm before clipping, and tokens per second.")
    report.table(*_summary(train, validation))


def _losses(train: Rows, validation: Rows, rows: Rows) -> Any:
    figure, axis = new_figure()
    for name in [name for name in train[-1] if name.startswith("loss/")]:
        _plot(axis, train, name, label=name.removeprefix("loss/"))
    _plot(axis, validation, "validation/main", label="main, held out", marker="o", linestyle="none", color="black")
    for before, row in zip(rows, rows[1:], strict=False):
        if row["stage"] != before["stage"]:
            axis.axvline(before["step"], color="gray", linestyle=":")
    step_axis(axis, "optimizer step")
    axis.set_ylabel("nats per token")
    axis.legend()
    return figure


def _by_position(validation: Rows) -> Any:
    figure, axis = new_figure()
    for row in (validation[0], validation[-1]):
        axis.plot(
            row["validation/position_edges"],
            row["validation/loss_by_position"],
            marker="o",
            label=f"step {row['step']}",
        )
    edges = {edge for row in (validation[0], validation[-1]) for edge in row["validation/position_edges"]}
    length_axis(axis, "position, up to", sorted(edges))
    axis.set_ylabel("nats per token")
    axis.legend()
    return figure


def _acceptance(validation: Rows) -> Any:
    figure, axis = new_figure()
    for name in [name for name in validation[-1] if name.startswith("validation/acceptance_")]:
        _plot(axis, validation, name, label=f"head {name.rsplit('_', 1)[1]}", marker="o")
    step_axis(axis, "optimizer step")
    axis.set(ylabel="acceptance", ylim=(0, 1))
    axis.legend()
    return figure


def _expert_load(train: Rows) -> Any:
    figure, (over_time, last) = new_figure(columns=2, width=10)
    names = [name for name in train[-1] if name.startswith("expert_load/max_over_mean_")]
    if len(names) <= _MAX_LINES:
        for name in names:
            _plot(over_time, train, name, label=f"layer {name.rsplit('_', 1)[1]}")
    else:
        steps = [row["step"] for row in train]
        for label, pick in (("most uneven layer", max), ("median layer", statistics.median), ("most even layer", min)):
            over_time.plot(steps, [pick(row[name] for name in names) for row in train], label=label)
    step_axis(over_time, "optimizer step")
    over_time.set_ylabel("max / mean load")
    over_time.legend()
    load = train[-1]["expert_load/by_layer"]
    shares = [[count / max(sum(layer), 1) for count in layer] for layer in load]
    last.grid(False)
    image = last.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    if len(names) <= _MAX_LINES:
        last.set_yticks(range(len(names)), [name.rsplit("_", 1)[1] for name in names])
    last.set(
        xlabel="expert",
        ylabel="layer" if len(names) <= _MAX_LINES else "sparse layer",
        title="share of tokens, last step",
    )
    figure.colorbar(image, ax=last)
    return figure


def _speed(train: Rows) -> Any:
    figure, axes = new_figure(columns=3, width=11, height=3)
    titles = {"lr": "learning rate", "gradient/norm": "gradient norm", "tokens_per_second": "tokens per second"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        _plot(axis, train, name)
        step_axis(axis, "optimizer step")
        axis.set_title(title)
    return figure


def _summary(train: Rows, validation: Rows) -> tuple[list[str], list[list[Any]]]:
    last = train[-1]
    rows = [
        ["optimizer steps", last["step"]],
        ["tokens", last["tokens"]],
        ["tokens per second, last step", float(last["tokens_per_second"])],
        ["FLOP/s over those of a measured matrix product", float(last.get("matmul_utilization", math.nan))],
        ["peak memory, MiB", float(last["memory_bytes"] / 2**20)],
        ["gradient entries that are exactly zero", last["gradient/num_zeros"]],
    ]
    if validation:
        rows.append(["held-out loss, nats per token", float(validation[-1]["validation/main"])])
    return ["figure", "value"], rows


def _plot(axis: Any, rows: Rows, name: str, label: str | None = None, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    axis.plot([step for step, _ in points], [value for _, value in points], label=label, **style)
