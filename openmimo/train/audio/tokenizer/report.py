"""The report of a tokenizer's training: losses, mel distance by codebooks, use of the codebooks, spectrograms."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openmimo.core.metrics import Row, read_metrics
from openmimo.model.audio.config import AudioTokenizerConfig
from openmimo.model.audio.tokenizer import AudioTokenizer
from openmimo.runtime.report import Report, new_figure, step_axis
from openmimo.train.audio.tokenizer.clips import Clip, fixed_segments

_SHOWN_SECONDS, _SHOWN_CLIPS = 3.0, 2


def write_report(run_folder: Path, tokenizer: AudioTokenizer, held_out: Sequence[Clip]) -> Path:
    """Write `report.html` of a run. Returns its path.

    Args:
        run_folder: The run, with `metrics.jsonl`.
        tokenizer: The trained tokenizer.
        held_out: Clips for the spectrograms.
    """
    rows = read_metrics(run_folder / "metrics.jsonl")
    report = Report(f"Audio tokenizer of {run_folder}")
    report.figure(_losses(rows), "losses by step")
    evaluations = [row for row in rows if "validation/mel_by_codebooks" in row]
    if evaluations:
        distances = evaluations[-1]["validation/mel_by_codebooks"]
        report.heading("Held-out clips")
        report.figure(_by_codebooks(tokenizer.config, evaluations), "mel distance of held-out segments by codebooks")
        report.table(
            ["codebooks", "kbit/s", "mel distance", "entries", "perplexity of the last"],
            [
                [count, bits_per_second(tokenizer.config, count) / 1000, distance, size, used]
                for count, (distance, size, used) in enumerate(
                    zip(
                        distances,
                        tokenizer.config.codebook_sizes,
                        evaluations[-1]["validation/perplexity"],
                        strict=True,
                    ),
                    start=1,
                )
            ],
        )
    report.figure(spectrograms(tokenizer, held_out), "log-mel spectrograms: held-out clips, and decoded from codebooks")
    return report.write(run_folder / "report.html")


def bits_per_second(config: AudioTokenizerConfig, codebooks: int) -> float:
    """Return the bits per second of the codes of the first codebooks."""
    return config.frames_per_second * sum(math.log2(size) for size in config.codebook_sizes[:codebooks])


def _losses(rows: Sequence[Row]) -> Any:
    figure, axis = new_figure()
    names = sorted({name for row in rows for name in row if name.startswith("loss/")})
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), label=name.removeprefix("loss/"), linewidth=1)
    axis.set_yscale("symlog", linthresh=0.1)
    step_axis(axis, "step")
    axis.legend(fontsize=8)
    return figure


def _by_codebooks(config: AudioTokenizerConfig, evaluations: Sequence[Row]) -> Any:
    figure, axis = new_figure()
    counts = range(1, config.num_codebooks + 1)
    for row in (evaluations[0], evaluations[len(evaluations) // 2], evaluations[-1]):
        axis.plot(counts, row["validation/mel_by_codebooks"], marker="o", label=f"step {row['step']}")
    axis.set_xlabel("codebooks")
    axis.set_ylabel("mel distance")
    axis.legend()
    return figure


@torch.no_grad()
def spectrograms(tokenizer: AudioTokenizer, held_out: Sequence[Clip]) -> Any:
    """Return a figure of log-mel spectrograms: held-out clips, and the same decoded from 1, some and all codebooks."""
    config = tokenizer.config
    samples = round(_SHOWN_SECONDS * config.frames_per_second) * config.samples_per_frame
    shown = fixed_segments(held_out, _SHOWN_CLIPS, samples).waveform_BS.to(tokenizer.device)
    counts = sorted({1, max(1, config.num_codebooks // 2), config.num_codebooks})
    figure, axes = new_figure(
        width=4 * len(shown), height=2.2 * (1 + len(counts)), columns=len(shown), rows=1 + len(counts)
    )
    axes = axes.reshape(1 + len(counts), len(shown))
    for column, waveform_S in enumerate(shown):
        codes_FQ = tokenizer.encode(waveform_S)
        decoded = [tokenizer.decode(codes_FQ[:, :count])[:samples] for count in counts]
        for axis, (title, audio_S) in zip(
            axes[:, column],
            [
                ("recording", waveform_S),
                *((f"{count} codebooks", audio) for count, audio in zip(counts, decoded, strict=True)),
            ],
            strict=True,
        ):
            mel_LM = tokenizer.log_mel(audio_S[None])[0].cpu().numpy() * config.mel_scale + config.mel_center
            axis.imshow(
                mel_LM.T,
                origin="lower",
                aspect="auto",
                vmin=-11,
                vmax=2,
                extent=(0, _SHOWN_SECONDS, 0, config.mel_bins),
            )
            axis.set_title(title, fontsize=9)
            axis.grid(visible=False)
    return figure
