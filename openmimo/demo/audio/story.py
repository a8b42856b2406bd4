"""`openmimo audio demo`: real speech, an audio tokenizer, a model that transcribes and speaks, measurements, a report.

The result of each part is a file in the demo's folder. A part with a result is skipped. An interrupted training part
resumes from its newest checkpoint.
"""

import shlex
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openmimo.core import config as config_io
from openmimo.core.config import run_folder
from openmimo.core.errors import ConfigError
from openmimo.core.files import cache_folder
from openmimo.data.audio.corpus import Corpus, read_corpus, write_corpus
from openmimo.demo.audio.config import AudioDemoConfig
from openmimo.demo.audio.judge import SpeakerJudge
from openmimo.demo.audio.measure import check_measurable, measure_hearing, measure_speech, measure_tokenizer
from openmimo.demo.audio.page import AudioFindings, write_page
from openmimo.demo.parts import Parts
from openmimo.demo.story import program
from openmimo.train.audio.run import train_audio
from openmimo.train.audio.tokenizer.run import train_tokenizer
from openmimo.train.config import check_path

REFERENCE_MACHINE = "2 cores of an AMD EPYC (family 25), otherwise nearly idle, 2026-11-28"
REFERENCE_SECONDS = {
    "data": 9, "tokenizer": 156, "decoder": 184, "quality": 16, "language": 259, "hearing": 3, "speech": 14,
}  # fmt: skip


def run(config: AudioDemoConfig) -> Path:
    """Runs the parts of the demo that have no result yet, and returns the path of the report.

    Raises:
        ConfigError: The folder cannot be used, or contains a demo with other settings; a package is not installed.
        DataError: The speech cannot be loaded, or lacks what is measured.
    """
    console = Console()
    folder = Path(config.folder)
    check_path(config.folder, "folder")
    path = folder / "config.json"
    if path.exists() and config_io.load(AudioDemoConfig, path) != config:
        raise ConfigError(f"{folder} contains a demo with other settings; name another --folder, or remove it.")
    if config.threads:
        torch.set_num_threads(config.threads)
    SpeakerJudge()  # before minutes of training: its weights may be missing
    with run_folder(folder):
        config_io.save(config, path)
        return _tell(config, folder, console)


def _tell(config: AudioDemoConfig, folder: Path, console: Console) -> Path:
    parts, sounds = Parts(folder, console, REFERENCE_SECONDS, REFERENCE_MACHINE), folder / "sounds"
    parts.print_time()
    tokenizer, model = (Path(part.run_folder) / "model" for part in (config.decoder, config.language))
    data = parts.run("data", "1/4  speech of one voice, and sentences composed of its words", lambda: _data(config))
    corpus = read_corpus(config.tokenizer.corpus)
    check_measurable(corpus)
    parts.run("tokenizer", "2/4  audio tokenizer", lambda: {"model": str(train_tokenizer(config.tokenizer))})
    parts.run("decoder", "     its decoder alone", lambda: {"model": str(train_tokenizer(config.decoder))})
    quality = parts.run(
        "quality",
        "     its sound by number of codebooks",
        lambda: measure_tokenizer(corpus, tokenizer, sounds, config.measured_clips),
    )
    parts.run("language", "3/4  language model", lambda: {"model": str(train_audio(config.language))})
    hearing = parts.run(
        "hearing",
        "4/4  transcription of held-out sentences",
        lambda: measure_hearing(corpus, model, config.transcribed),
    )
    speech = parts.run(
        "speech",
        "     speech, and whose voice it is",
        lambda: measure_speech(corpus, model, sounds, config.spoken),
    )
    findings = AudioFindings(data, quality, hearing, speech, parts.seconds())
    report = write_page(folder, config, findings)
    _say(console, findings, report, model)
    return report


def _data(config: AudioDemoConfig) -> dict[str, Any]:
    corpus = write_corpus(Path(config.tokenizer.corpus), config.corpus, cache_folder() / "audio")
    return {"minutes": _minutes(corpus), "notes": list(corpus.notes)}


def _minutes(corpus: Corpus) -> dict[str, float]:
    names = {
        f"{split}{' composed' if composed else ''}": corpus.select(split, composed=composed)
        for split in ("train", "heldout", "other")
        for composed in (False, True)
    }
    return {name: sum(clip.seconds for clip in clips) / 60 for name, clips in names.items() if clips}


def _say(console: Console, findings: AudioFindings, report: Path, model: Path) -> None:
    """Prints the results, and commands that try the model."""
    rows, hearing, speech = findings.quality["codebooks"], findings.hearing["heldout"], findings.speech
    quality = findings.quality
    lines = [
        "",
        "mel distance      " + "  ".join(f"{count}: {row['mel']:.2f}" for count, row in enumerate(rows, 1)),
        f"all codebooks     {rows[-1]['bits_per_second'] / 1000:.2f} kbit/s, STOI {rows[-1]['stoi']:.2f}, "
        f"SI-SDR {rows[-1]['si_sdr']:.1f} dB, speaker similarity {rows[-1]['similarity']:.2f} "
        f"(recordings: {quality['recorded_similarity']:.2f})",
        f"streaming         real-time factor {quality['decode_factor']:.2f}, first samples after "
        f"{1000 * quality['first_samples_seconds']:.0f} ms",
        f"transcription     word error {hearing['word_error']:.0%} (chance {hearing['chance_word_error']:.0%}), "
        f"character error {hearing['character_error']:.0%} (chance {hearing['chance_character_error']:.0%}), "
        f"{hearing['exact']:.0%} of the sentences without an error",
        f"speech            {speech['attributed']:.0%} attributed to the training voice, real-time factor "
        f"{speech['factor']:.2f}, first samples after {1000 * speech['first_samples_seconds']:.0f} ms",
        f"report            {report}",
        f"sounds            {report.parent / 'sounds'}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    for title, command in commands(model, report.parent / "sounds").items():
        print(f"{title:<17} {command}")  # not styled, so that it can be copied


def commands(model: Path, sounds: Path) -> dict[str, str]:
    """Returns commands that try the model, and run in the present working folder as they are printed."""
    audio = [*program(), "audio"]
    return {
        "transcribe": shlex.join([*audio, "transcribe", str(sounds / "composed-0.wav"), "--model", str(model)]),
        "speak": shlex.join([*audio, "speak", "you have two new messages", "reply.wav", "--model", str(model)]),
    }
