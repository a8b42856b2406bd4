"""Scores of finished examples: means with intervals, effective length, tables, and heat maps of length x depth."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from openmimo.evals.task import Score, score_of
from openmimo.runtime.report import Report, new_figure

THRESHOLD = 0.856  # RULER: the score of Llama-2-7B at 4096 tokens
_DEPTH_BINS = 10
_METRIC = "metric/"


@dataclass(frozen=True)
class Answered:
    """One finished example.

    Attributes:
        label: The line of the suite.
        length: Tokens of the room.
        index: Number of the example.
        score: 0 to 1.
        depth: Relative position of the fact, if it has one.
        metrics: Other measures.
        text: The answer of the model.
    """

    label: str
    length: int
    index: int
    score: float
    depth: float | None
    metrics: Mapping[str, float]
    text: str

    def row(self) -> dict[str, Any]:
        """The values of a line of `metrics.jsonl`."""
        row = {"label": self.label, "length": self.length, "index": self.index, "score": self.score, "text": self.text}
        if self.depth is not None:
            row["depth"] = self.depth
        return row | {f"{_METRIC}{name}": value for name, value in self.metrics.items()}


def answered(row: Mapping[str, Any]) -> Answered:
    """The finished example of a line of `metrics.jsonl`."""
    metrics = {name.removeprefix(_METRIC): value for name, value in row.items() if name.startswith(_METRIC)}
    return Answered(
        row["label"], row["length"], row["index"], row["score"], row.get("depth"), metrics, row.get("text", "")
    )


@dataclass(frozen=True)
class Results:
    """The scores of an evaluation.

    Attributes:
        scores: By label, in order of length. A mean of several tasks has the examples of all of them.
        metrics: Means of other measures by label and length.
        examples: The finished examples.
    """

    scores: Mapping[str, list[Score]]
    metrics: Mapping[str, Mapping[int, Mapping[str, float]]]
    examples: list[Answered]

    def effective_length(self, label: str) -> int | None:
        """The largest length whose score is at least the threshold of RULER; None if there is none."""
        return max((score.length for score in self.scores[label] if score.mean >= THRESHOLD), default=None)

    def as_json(self) -> dict[str, Any]:
        """Scores, metrics and effective lengths."""
        return {
            "scores": [
                {"task": label, **vars(score), "metrics": dict(self.metrics.get(label, {}).get(score.length, {}))}
                for label, scores in self.scores.items()
                for score in scores
            ],
            "effective_lengths": {label: self.effective_length(label) for label in self.scores},
            "threshold": THRESHOLD,
        }


def summarize(examples: Iterable[Answered], means: Mapping[str, tuple[str, ...]]) -> Results:
    """The scores of finished examples.

    Args:
        examples: In any order.
        means: Labels whose scores form a mean, by its name. A length counts where every label was measured. Tasks have
            equal weights.
    """
    examples = list(examples)
    cells: dict[str, dict[int, list[Answered]]] = {}
    for example in examples:
        cells.setdefault(example.label, {}).setdefault(example.length, []).append(example)
    scores = {
        label: [score_of(length, [one.score for one in by_length[length]]) for length in sorted(by_length)]
        for label, by_length in cells.items()
    }
    for name, labels in means.items():
        if combined := _means(cells, labels):
            scores[name] = combined
    metrics = {
        label: {length: _metric_means(cell) for length, cell in by_length.items()} for label, by_length in cells.items()
    }
    return Results(scores, metrics, examples)


def _means(cells: Mapping[str, Mapping[int, list[Answered]]], labels: tuple[str, ...]) -> list[Score]:
    lengths = set.intersection(*(set(cells.get(label, {})) for label in labels))
    result = []
    for length in sorted(lengths):
        parts = [[one.score for one in cells[label][length]] for label in labels]
        weighted = [sum(values) / len(values) for values in parts]
        total = score_of(length, [value for values in parts for value in values])
        mean = sum(weighted) / len(weighted)
        result.append(Score(length, total.examples, mean, min(total.low, mean), max(total.high, mean)))
    return result


def _metric_means(cell: list[Answered]) -> dict[str, float]:
    names = dict.fromkeys(name for one in cell for name in one.metrics)
    found = {name: [one.metrics[name] for one in cell if name in one.metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def score_table(results: Results, title: str) -> Table:
    """A line for each task and mean, a column for each length, and the effective length."""
    lengths = sorted({score.length for scores in results.scores.values() for score in scores})
    table = Table("task", *map(str, lengths), "effective", title=title)
    for label, scores in results.scores.items():
        by_length = {score.length: score for score in scores}
        cells = [_cell(by_length[length]) if length in by_length else "-" for length in lengths]
        table.add_row(label, *cells, str(results.effective_length(label) or "-"))
    return table


def _cell(score: Score) -> str:
    spread = max(score.high - score.mean, score.mean - score.low)
    return f"{100 * score.mean:.1f} ±{100 * spread:.0f}"


def heat_map(examples: list[Answered], labels: list[str]) -> Any:
    """A matplotlib figure: the mean score by length and depth, one panel for each label."""
    figure, axes = new_figure(width=max(2.6 * len(labels), 4.5), height=3.4, columns=len(labels))
    image = None
    for label, axis in zip(labels, axes if len(labels) > 1 else [axes], strict=True):
        mine = [one for one in examples if one.label == label and one.depth is not None]
        lengths = sorted({one.length for one in mine})
        sums = [[[0.0, 0] for _ in lengths] for _ in range(_DEPTH_BINS)]
        for one in mine:
            assert one.depth is not None
            cell = sums[min(int(one.depth * _DEPTH_BINS), _DEPTH_BINS - 1)][lengths.index(one.length)]
            cell[0] += one.score
            cell[1] += 1
        means = [[total / count if count else float("nan") for total, count in row] for row in sums]
        axis.grid(False)
        image = axis.imshow(means, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        axis.set_yticks([-0.5, _DEPTH_BINS / 2 - 0.5, _DEPTH_BINS - 0.5], ["start", "middle", "end"])
        axis.set(title=label, xlabel="tokens")
    figure.colorbar(image, ax=axes, label="mean score")
    return figure


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 and length >= 4096 else str(length)


def labels_with_depth(results: Results) -> list[str]:
    """The labels whose examples have a depth."""
    return list(dict.fromkeys(one.label for one in results.examples if one.depth is not None))


_PANELS = 4


def write_report(results: Results, title: str, folder: Path) -> Path:
    """Write `report.html` with the table, the other measures and the heat maps."""
    report = Report(title)
    lengths = sorted({score.length for scores in results.scores.values() for score in scores})
    rows: list[list[Any]] = []
    for label, scores in results.scores.items():
        cells = {
            score.length: f"{100 * score.mean:.1f} ({100 * score.low:.0f} to {100 * score.high:.0f})"
            for score in scores
        }
        rows.append([label, *(cells.get(length, "-") for length in lengths), results.effective_length(label) or "-"])
    report.paragraph(
        "Mean scores in percent with 95 % Wilson intervals by the tokens of prompt and answer. The effective length is "
        f"the largest with a score of {100 * THRESHOLD:.1f} or more, as RULER defines it."
    )
    report.table(["task", *map(str, lengths), "effective length"], rows)
    others = [
        [label, length, name, value]
        for label, by_length in results.metrics.items()
        for length, measures in sorted(by_length.items())
        for name, value in measures.items()
    ]
    if others:
        report.heading("Other measures")
        report.table(["task", "tokens", "measure", "mean"], others)
    labels = labels_with_depth(results)
    if labels:
        report.heading("Score by length and depth")
        for start in range(0, len(labels), _PANELS):
            shown = labels[start : start + _PANELS]
            report.figure(heat_map(results.examples, shown), f"Mean score by length and depth: {', '.join(shown)}.")
    return report.write(folder / "report.html")
