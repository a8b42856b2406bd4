"""The demo's report: what was trained, what the extension did for retrieval, what drafts do for decoding."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmimo.core.metrics import read_metrics
from openmimo.demo.config import DemoConfig
from openmimo.rl.compare import Cell, seesaw_figure, seesaw_table
from openmimo.runtime.report import Report, new_figure
from openmimo.train.outcome import add_training_figures


@dataclass(frozen=True)
class Findings:
    """The measurements of the demo, as plain JSON.

    Attributes:
        before: Retrieval by context length before the extension.
        after: Retrieval by context length after it.
        decoding: Decoding with drafts and without.
        seesaw: Cells by model and domain.
        answers: Drafting on problems, by model (`sft`, `student`).
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
        f"Pre-training saw at most {trained} tokens at once; the extension went on at "
        f"{config.extend.sequence_length} with a larger RoPE base in the full layers. One fact among several, asked at "
        "the end of the context:"
    )
    report.figure(_retrieval(findings, config), "Share of facts found by context length, with 95 % intervals.")
    report.heading("Decoding")
    report.figure(
        _decoding(findings.decoding),
        "Greedy decoding of held-out text at batch 1, and drafts accepted by head. The engine drafts with as many "
        "heads as pay, and hardly tries the others.",
    )
    report.paragraph(
        "The text with drafts is the text without them."
        if findings.decoding["same_text"]
        else "The texts differ: at some place two tokens were equally likely to within rounding."
    )
    report.figure(_cache(findings.decoding), "Cache of one sequence: this model, and the same with every layer global.")
    for sample in findings.decoding["samples"][:2]:
        report.code(f"{sample['prompt']}⟨here the model goes on⟩{sample['text']}")
    report.heading("Post-training: the see-saw")
    report.paragraph(
        "Fine-tuned on demonstrations, then one teacher for each domain by reinforcement learning on verified answers, "
        "each better at home and often worse elsewhere; then one student that learned from all of them on its own "
        "answers, with its own former self as the teacher of the domain that has no other."
    )
    report.figure(seesaw_figure(config.compare, _cells(findings)), "Mean reward on held-out problems, by domain.")
    header, rows = seesaw_table(config.compare, _cells(findings))
    report.table(header, rows)
    drafts = {name: stats["accepted_tokens_per_step"] for name, stats in findings.answers.items()}
    report.paragraph(
        f"Tokens a step with three heads drafting on such problems: {drafts['sft']:.2f} before distillation, "
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
    for scores, label in ((findings.before, "before the extension"), (findings.after, "after")):
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
        axis.annotate(label, (length, 1.03), ha="center", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="context length, tokens", ylabel="facts found", ylim=(-0.03, 1.1))
    axis.legend()
    return figure


def _decoding(decoding: dict[str, Any]) -> Any:
    figure, (speed, heads) = new_figure(columns=2, width=9)
    values = [decoding["plain"]["tokens_per_second"], decoding["speculative"]["tokens_per_second"]]
    speed.bar(["plain", "with MTP drafts"], values)
    speed.bar_label(speed.containers[0], fmt="%.0f")
    speed.set(ylabel="tokens per second")
    acceptance = decoding["speculative"]["acceptance_by_head"]
    heads.bar([f"head {head}" for head in range(len(acceptance))], acceptance)
    heads.bar_label(heads.containers[0], fmt="%.2f")
    heads.set(
        ylabel="drafts accepted",
        ylim=(0, 1.1),
        title=f"{decoding['speculative']['accepted_tokens_per_step']:.2f} tokens a step",
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
