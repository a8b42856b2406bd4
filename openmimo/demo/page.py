"""The HTML report of the demo: training, retrieval before and after the extension, decoding with drafts, see-saw."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmimo.core.metrics import read_metrics
from openmimo.demo.config import DemoConfig
from openmimo.rl.compare import Cell, seesaw_figure, seesaw_table
from openmimo.runtime.report import Report, length_axis, new_figure
from openmimo.train.outcome import add_training_figures


@dataclass(frozen=True)
class Findings:
    """The measurements of the demo, as plain JSON.

    Attributes:
        before: Retrieval scores before the extension, one per context length.
        after: Retrieval scores after the extension, one per context length.
        decoding: Statistics of decoding with and without drafts.
        seesaw: Fields of `Cell` by model and domain.
        answers: Statistics of drafting on problems by model (`sft`, `student`).
        seconds: Wall time by part.
    """

    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    decoding: dict[str, Any]
    seesaw: dict[str, dict[str, dict[str, Any]]]
    answers: dict[str, dict[str, Any]]
    seconds: dict[str, float]


def write_page(folder: Path, config: DemoConfig, findings: Findings) -> Path:
    """Writes `report.html` in the demo's folder and returns its path."""
    report = Report("openmimo demo: a tiny MiMo, from random weights to a student of three teachers")
    minutes = sum(findings.seconds.values()) / 60
    report.paragraph(
        "A model with 5:1 sliding-window and global attention, learnable sinks, eight experts and multi-token "
        "prediction, trained on the text of Python's standard library and synthetic retrieval in "
        f"{minutes:.1f} minutes on this machine."
    )
    report.heading("Context extension")
    trained = max(stage.sequence_length for stage in config.pretrain.stages)
    report.paragraph(
        f"Pre-training used sequences of at most {trained} tokens. The extension used "
        f"{config.extend.sequence_length} tokens and a larger RoPE base in the full layers. The evaluation queries one "
        "of several facts at the end of the context."
    )
    report.figure(_retrieval(findings, config), "Share of facts found by context length, with 95 % intervals.")
    report.heading("Decoding")
    report.figure(
        _decoding(findings.decoding),
        "Greedy decoding of held-out text at batch size 1, and acceptance of drafts by head. The engine chooses the "
        "fastest number of heads and tries other numbers rarely.",
    )
    report.paragraph(
        "Decoding with and without drafts gives the same text."
        if findings.decoding["same_text"]
        else "The texts with and without drafts differ: two tokens were equally likely within rounding."
    )
    report.figure(
        _cache(findings.decoding),
        "Cache of one sequence, for this model and for the same model with all layers global.",
    )
    report.paragraph("Two samples. The model generated the marked text.")
    for sample in findings.decoding["samples"][:2]:
        report.continuation(sample["prompt"], sample["text"])
    report.heading("Post-training: the see-saw")
    report.paragraph(
        "The base is fine-tuned on demonstrations. Reinforcement learning on verified answers then trains one teacher "
        "for each domain, which improves in that domain and often degrades in others. The student learns from all "
        "teachers on its own answers. In the domain without a teacher, its initial weights are the teacher."
    )
    report.figure(seesaw_figure(config.compare, _cells(findings)), "Mean reward on held-out problems, by domain.")
    header, rows = seesaw_table(config.compare, _cells(findings))
    report.table(header, rows)
    drafts = {name: stats["accepted_tokens_per_step"] for name, stats in findings.answers.items()}
    report.paragraph(
        f"Tokens per step on these problems with three drafting heads: {drafts['sft']:.2f} before distillation, "
        f"{drafts['student']:.2f} after."
    )
    for run_folder, title in ((config.pretrain.run_folder, "Pre-training"), (config.extend.run_folder, "Extension")):
        report.heading(title)
        add_training_figures(report, read_metrics(Path(run_folder) / "metrics.jsonl"))
    report.heading("Time")
    report.table(["part", "seconds"], [[name, float(seconds)] for name, seconds in findings.seconds.items()])
    return report.write(folder / "report.html")


def _cells(findings: Findings) -> dict[str, dict[str, Cell]]:
    return {name: {domain: Cell(**cell) for domain, cell in row.items()} for name, row in findings.seesaw.items()}


def _retrieval(findings: Findings, config: DemoConfig) -> Any:
    figure, axis = new_figure()
    for scores, label in ((findings.before, "before the extension"), (findings.after, "after the extension")):
        lengths = [score["length"] for score in scores]
        means = [score["mean"] for score in scores]
        below = [score["mean"] - score["low"] for score in scores]
        above = [score["high"] - score["mean"] for score in scores]
        axis.errorbar(lengths, means, yerr=[below, above], marker="o", capsize=3, label=label)
    for length, label in (
        (max(stage.sequence_length for stage in config.pretrain.stages), "trained to"),
        (config.extend.sequence_length, "extended to"),
    ):
        axis.axvline(length, color="gray", linestyle=":")
        axis.annotate(
            label, (length, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=8,
        )  # fmt: skip
    length_axis(axis, "context length, tokens", [score["length"] for score in findings.before])
    axis.set(ylabel="facts found", ylim=(-0.03, 1.05))
    axis.legend()
    return figure


def _decoding(decoding: dict[str, Any]) -> Any:
    figure, (speed, heads) = new_figure(columns=2, width=9)
    values = [decoding["plain"]["tokens_per_second"], decoding["speculative"]["tokens_per_second"]]
    speed.bar(["plain", "with MTP drafts"], values)
    speed.bar_label(speed.containers[0], fmt="%.0f")
    speed.set(ylabel="tokens per second", ylim=(0, 1.1 * max(values)))
    acceptance = decoding["speculative"]["acceptance_by_head"]
    heads.bar([f"head {head}" for head in range(len(acceptance))], acceptance)
    heads.bar_label(heads.containers[0], fmt="%.2f")
    heads.set(
        ylabel="drafts accepted",
        ylim=(0, 1.1),
        title=f"{decoding['speculative']['accepted_tokens_per_step']:.2f} tokens per step",
    )
    return figure


def _cache(decoding: dict[str, Any]) -> Any:
    figure, axis = new_figure(height=2.2)
    sizes = [decoding["cache_bytes"] / 1024, decoding["all_global_cache_bytes"] / 1024]
    axis.barh(["this model", "all layers global"], sizes)
    axis.bar_label(axis.containers[0], fmt="%.0f KiB", padding=3)
    axis.set(xlabel=f"KiB at {decoding['cache_positions']} positions", xlim=(0, 1.2 * max(sizes)))
    axis.invert_yaxis()
    return figure
