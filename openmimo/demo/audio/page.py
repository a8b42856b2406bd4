"""The HTML report of the speech demo: quality by bitrate, spectrograms, transcriptions, speech to listen to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmimo.core.metrics import read_metrics
from openmimo.data.audio.corpus import TRAINING_VOICE
from openmimo.data.audio.files import audio_bytes, read_audio
from openmimo.demo.audio.config import AudioDemoConfig
from openmimo.demo.audio.measure import log_mel
from openmimo.model.audio.tokenizer import load_audio_tokenizer
from openmimo.runtime.report import Report, new_figure, step_axis
from openmimo.train.outcome import add_training_figures

_SHOWN = 12


@dataclass(frozen=True)
class AudioFindings:
    """The measurements of the speech demo, as plain JSON.

    Attributes:
        data: Minutes of speech by split.
        quality: Results of `measure_tokenizer`.
        hearing: Results of `measure_hearing`.
        speech: Results of `measure_speech`.
        seconds: Wall time by part.
    """

    data: dict[str, Any]
    quality: dict[str, Any]
    hearing: dict[str, Any]
    speech: dict[str, Any]
    seconds: dict[str, float]


def write_page(folder: Path, config: AudioDemoConfig, findings: AudioFindings) -> Path:
    """Writes `report.html` in the demo's folder and returns its path."""
    report = Report("openmimo audio demo: a tiny MiMo-Audio, from recordings to a model that hears and speaks")
    minutes = findings.data["minutes"]
    report.paragraph(
        f"Trained on {minutes['train']:.0f} minutes of recordings of one voice, and on {minutes['train composed']:.0f} "
        f"minutes of sentences composed of its recorded words, in {sum(findings.seconds.values()) / 60:.1f} minutes "
        "on this machine. The recordings are under the Creative Commons license BY-SA 3.0 (Allison Smith, Digium), and "
        "so are the sounds of this page."
    )
    _add_tokenizer(report, folder, config, findings)
    _add_hearing(report, findings)
    _add_speech(report, folder, config, findings)
    report.heading("Training")
    runs = [Path(part.run_folder) for part in (config.tokenizer, config.decoder)]
    report.figure(
        _losses(runs), "Mel distance of the tokenizer by step; with more scales while its decoder is trained."
    )
    add_training_figures(report, read_metrics(Path(config.language.run_folder) / "metrics.jsonl"))
    report.heading("Time")
    report.table(["part", "seconds"], [[name, float(seconds)] for name, seconds in findings.seconds.items()])
    return report.write(folder / "report.html")


def _add_tokenizer(report: Report, folder: Path, config: AudioDemoConfig, findings: AudioFindings) -> None:
    quality, rows = findings.quality, findings.quality["codebooks"]
    report.heading("The tokenizer: quality by bitrate")
    report.paragraph(
        f"{quality['clips']} held-out recordings, {quality['seconds']:.0f} seconds. Similarity is the cosine of the "
        "judge's embeddings (Resemblyzer) of a decoded recording and of the training voice; the recordings themselves "
        f"have {quality['recorded_similarity']:.2f}."
    )
    report.table(
        ["codebooks", "kbit/s", "mel distance", "SI-SDR, dB", "STOI", "similarity", "perplexity of the last", "of"],
        [
            [count, row["bits_per_second"] / 1000, row["mel"], row["si_sdr"], row["stoi"], row["similarity"],
             used, size]
            for count, (row, used, size) in enumerate(zip(rows, quality["perplexity"], _sizes(config), strict=True), 1)
        ],
    )  # fmt: skip
    report.figure(_by_bitrate(rows, quality["recorded_similarity"]), "Quality of held-out recordings by bitrate.")
    shown = ["recorded", *(f"decoded-{used}" for used in sorted({1, 2, 4, len(rows)}))]
    report.figure(_spectrograms(folder, config, shown), f"Log-mel spectrograms of {quality['shown']}, held out.")
    report.sounds([(_caption(name), _mp3(folder, name)) for name in shown])
    report.paragraph(
        f"Streaming decode, four frames (0.16 s) at a time: real-time factor {quality['decode_factor']:.3f}, first "
        f"samples after {1000 * quality['first_samples_seconds']:.0f} ms. Encoding: {quality['encode_factor']:.3f}."
    )


def _add_hearing(report: Report, findings: AudioFindings) -> None:
    report.heading("Transcription")
    rows = []
    for name, title in (("heldout", "held-out sentences of the voice"), ("other_voices", "other voices")):
        part = findings.hearing[name]
        rows.append(
            [title, len(part["found"])]
            + [float(part[key]) for key in ("word_error", "chance_word_error", "character_error",
                                            "chance_character_error", "exact")]
        )  # fmt: skip
    header = ["", "sentences", "word error", "by chance", "character error", "by chance", "without an error"]
    report.table(header, rows)
    report.paragraph(
        "A held-out sentence is a sequence of words that is in no training sentence. Its words were recorded once "
        "each, and the model knows these recordings. Chance is the error against the references of other sentences. "
        "Other voices say other words."
    )
    held_out = findings.hearing["heldout"]
    pairs = list(zip(held_out["references"], held_out["found"], strict=True))
    report.table(["said", "transcribed"], [list(pair) for pair in pairs[:_SHOWN]])


def _add_speech(report: Report, folder: Path, config: AudioDemoConfig, findings: AudioFindings) -> None:
    speech = findings.speech
    report.heading("Speech")
    own = speech["own_transcription"]["word_error"]
    report.paragraph(
        f"Texts of held-out sentences. The judge attributes {speech['attributed']:.0%} of them to the training voice: "
        f"it is the nearest of {len(speech['similarities'][0])} voices, with a similarity above "
        f"{speech['threshold']:.2f}, the middle between composed recordings of the same texts "
        f"({speech['recorded_similarity']:.2f}) and recordings of other voices ({speech['other_similarity']:.2f}). "
        f"Random codes have {speech['random_similarity']:.2f}."
    )
    report.paragraph(
        f"Real-time factor {speech['factor']:.2f}, first samples after "
        f"{1000 * speech['first_samples_seconds']:.0f} ms. The model transcribes its own speech with a word error of "
        f"{own:.0%}; it is no independent judge."
    )
    voices = list(speech["similarities"][0])
    report.table(
        ["text", *(f"like {name}" for name in voices)],
        [
            [text, *(row[name] for name in voices)]
            for text, row in zip(speech["texts"], speech["similarities"], strict=True)
        ],
    )
    names = [f"{kind}-{number}" for number in range(min(4, len(speech["texts"]))) for kind in ("spoken", "composed")]
    report.sounds(
        [(f"{_caption(name)}: {speech['texts'][int(name.split('-')[1])]}", _mp3(folder, name)) for name in names]
    )
    report.figure(_spectrograms(folder, config, names[:4]), "Log-mel spectrograms of the first two texts.")


def _sizes(config: AudioDemoConfig) -> tuple[int, ...]:
    return load_audio_tokenizer(str(Path(config.decoder.run_folder) / "model")).config.codebook_sizes


def _caption(name: str) -> str:
    kind, _, number = name.partition("-")
    return {
        "recorded": "as recorded",
        "decoded": f"from {number} codebook{'' if number == '1' else 's'}",
        "spoken": "spoken by the model",
        "composed": "composed of recordings",
    }[kind]


def _mp3(folder: Path, name: str) -> bytes:
    recording = read_audio(folder / "sounds" / f"{name}.wav")
    return audio_bytes(recording.samples_S, recording.sample_rate, ".mp3")


def _by_bitrate(rows: list[dict[str, float]], recorded: float) -> Any:
    figure, axes = new_figure(columns=4, width=12, height=3)
    kilobits = [row["bits_per_second"] / 1000 for row in rows]
    names = (("mel", "mel distance"), ("si_sdr", "SI-SDR, dB"), ("stoi", "STOI"), ("similarity", "speaker similarity"))
    for axis, (key, label) in zip(axes, names, strict=True):
        axis.plot(kilobits, [row[key] for row in rows], marker="o")
        axis.set(xlabel="kbit/s", ylabel=label)
    axes[3].axhline(recorded, color="gray", linestyle=":", label=f"recordings of {TRAINING_VOICE}")
    axes[3].legend(fontsize=8)
    return figure


def _spectrograms(folder: Path, config: AudioDemoConfig, names: list[str]) -> Any:
    tokenizer = load_audio_tokenizer(str(Path(config.decoder.run_folder) / "model"))
    figure, axes = new_figure(rows=len(names), width=9, height=1.7 * len(names))
    seconds_per_frame = tokenizer.config.hop_samples / tokenizer.config.sample_rate
    for axis, name in zip(axes, names, strict=True):
        mel = log_mel(tokenizer, read_audio(folder / "sounds" / f"{name}.wav").samples_S).numpy().T
        axis.imshow(
            mel, origin="lower", aspect="auto", cmap="magma", vmin=np.log(1e-5), vmax=3.0,
            extent=(0, mel.shape[1] * seconds_per_frame, 0, mel.shape[0]),
        )  # fmt: skip
        axis.set(ylabel="mel band", title=_caption(name))
        axis.grid(visible=False)
    axes[-1].set_xlabel("seconds")
    return figure


def _losses(runs: list[Path]) -> Any:
    figure, axes = new_figure(columns=len(runs), width=9)
    for axis, run in zip(axes, runs, strict=True):
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss/mel" in row]
        axis.plot([row["step"] for row in rows], [row["loss/mel"] for row in rows])
        axis.set(ylabel="multi-scale mel distance", title=run.name)
        step_axis(axis, "step")
    return figure
