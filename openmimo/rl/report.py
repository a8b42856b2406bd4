"""The report of a post-training run, made from its `metrics.jsonl`."""

import json
from pathlib import Path
from typing import Any

from openmimo.core.metrics import bootstrap_interval, read_metrics
from openmimo.runtime.report import Report, new_figure, step_axis

Rows = list[dict[str, Any]]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` in the run folder. Returns its path."""
    rows = read_metrics(run_folder / "metrics.jsonl")
    train = [row for row in rows if "samples" in row]
    evaluations = [row for row in rows if "evaluation/rewards" in row]
    report = Report(f"openmimo run {run_folder.name}")
    report.heading("Held-out problems")
    report.figure(_lines(evaluations, "evaluation/", exclude="rewards"), "Mean reward by domain.")
    report.table(*_before_and_after(evaluations))
    if train:
        _training_figures(report, train)
    report.heading("Configuration")
    report.code(json.dumps(json.loads((run_folder / "config.json").read_text()), indent=2))
    return report.write(run_folder / "report.html")


def _training_figures(report: Report, train: Rows) -> None:
    report.heading("Rollouts")
    report.figure(
        _panels(train, [("reward", "reward"), ("answer_tokens", "tokens an answer")], by_domain=True),
        "Mean reward and length of the samples that were learned from.",
    )
    report.figure(
        _panels(train, [("scheduler/waste_share", "wasted samples"), ("staleness_mean", "policy versions")]),
        "Share of samples that were rolled out and never learned from; mean age of their tokens.",
    )
    names = _names(train)
    if any(name.startswith("teacher_kl/") for name in names):
        report.heading("Teachers")
        report.figure(
            _panels(train, [("teacher_kl", "nats a token"), ("top_8_overlap", "share")], by_domain=True),
            "Divergence from the domain's teacher, and the share of its eight likeliest tokens among the student's.",
        )
    report.heading("Trainer against engine")
    report.figure(
        _panels(
            train, [("mismatch_k3", "k3, nats"), ("extreme_ratio_share_2", "share of tokens"), ("entropy", "nats")]
        ),
        "Difference of the trained policy from the one that sampled: k3, and tokens with a ratio above 2 or below 1/2. "
        "The policy's entropy.",
    )
    if "gated_high_share" in names:
        report.figure(
            _panels(train, [(name, "share of tokens") for name in names if name.startswith("gated_")]),
            "Tokens whose ratio is outside the limits of the correction.",
        )
    report.heading("Optimization")
    report.figure(
        _panels(train, [("gradient/norm", "gradient norm"), ("gradient/num_zeros", "entries")]),
        "Gradient norm before clipping, and gradient entries that are exactly zero.",
    )
    if sum(name.startswith("gradient_share/") for name in names) > 1:
        report.figure(
            _panels(train, [("gradient_share", "share of the gradient")], by_domain=True),
            "Share of each domain in the gradient: norms of the gradients of its tokens' last hidden states.",
        )
    report.figure(_panels(train, [("seconds", "seconds")], by_domain=True), "Seconds of a step, by phase.")
    last = train[-1]
    kept = sorted(name for name, value in last.items() if isinstance(value, (int, float)))
    report.table(["last step", "value"], [[name, last[name]] for name in kept])


def _names(rows: Rows) -> list[str]:
    """All metrics of these rows. A step that learned nothing has fewer than others."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _before_and_after(evaluations: Rows) -> tuple[list[str], list[list[Any]]]:
    table = []
    first, last = evaluations[0], evaluations[-1]
    for domain, after in last["evaluation/rewards"].items():
        before = first["evaluation/rewards"][domain]
        low, high = bootstrap_interval(after)
        table.append([domain, f"{_mean(before):.3f}", f"{_mean(after):.3f}", f"{low:.3f} to {high:.3f}", len(after)])
    return ["domain", f"step {first['step']}", f"step {last['step']}", "95 % interval", "problems"], table


def _lines(rows: Rows, prefix: str, *, exclude: str) -> Any:
    figure, axis = new_figure()
    for name in rows[-1]:
        if name.startswith(prefix) and name != prefix + exclude:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], marker="o", label=name[len(prefix) :])
    step_axis(axis, "step")
    axis.set(ylabel="mean reward", ylim=(-0.02, 1.02))
    axis.legend()
    return figure


def _panels(rows: Rows, panels: list[tuple[str, str]], *, by_domain: bool = False) -> Any:
    """One panel for each (metric, unit); with `by_domain`, with a line for each `<metric>/<domain>`."""
    figure, axes = new_figure(columns=len(panels))
    for axis, (metric, unit) in zip(axes if len(panels) > 1 else [axes], panels, strict=True):
        names = [name for name in _names(rows) if name.startswith(metric + "/")] if by_domain else [metric]
        if len(names) == 2 and f"{metric}/mean" in names:  # equal to the one domain's
            names.remove(f"{metric}/mean")
        for name in names:
            known = [row for row in rows if name in row]
            label = name.removeprefix(metric).strip("/").removesuffix("/mean").removesuffix("mean") or "all"
            axis.plot([row["step"] for row in known], [row[name] for row in known], label=label)
        step_axis(axis, "step")
        axis.set(ylabel=unit, title=metric.removeprefix("scheduler/").replace("_", " ").replace("/", " "))
        if by_domain and names:
            axis.legend()
    return figure


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
