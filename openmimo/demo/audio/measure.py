"""Measurements of the speech demo: the tokenizer by number of codebooks, and what the model hears and speaks."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmimo.core.errors import DataError
from openmimo.data.audio.corpus import TRAINING_VOICE, Clip, Corpus, Split
from openmimo.data.audio.files import SAMPLE_RATE, read_audio, write_audio
from openmimo.demo.audio.judge import SpeakerJudge
from openmimo.demo.audio.metrics import chance_error_rate, error_rate, si_sdr, stoi
from openmimo.engine.audio.engine import AudioEngine, AudioParams
from openmimo.model.audio.mel import LogMel
from openmimo.model.audio.quantizer import perplexity
from openmimo.model.audio.tokenizer import AudioTokenizer, load_audio_tokenizer
from openmimo.model.hf import CODEC_FOLDER

_VOICE_CLIPS = 24
_LEAST_SECONDS = 1.5
_MOST_SECONDS = 8.0


def check_measurable(corpus: Corpus) -> None:
    """Refuses a corpus from which the demo cannot be measured, before minutes of training.

    Raises:
        DataError: It lacks recordings or sentences; the message lists them.
    """
    lacking = [
        f"{least} {what}"
        for what, least, found in (
            (f"recordings of {_LEAST_SECONDS} to {_MOST_SECONDS:.0f} s for training", 1, _recorded(corpus, "train")),
            ("such recordings that are held out", 1, _recorded(corpus, "heldout")),
            ("held-out composed sentences", 2, corpus.select("heldout", composed=True, with_text=True)),
            ("recordings of other voices with text", 2, _of_others(corpus)),
        )
        if len(found) < least
    ]
    if lacking:
        raise DataError(
            f"the demo cannot be measured on {corpus.folder}, which lacks: at least {', '.join(lacking)}. The "
            "telephone prompts have all of it (leave --corpus.sounds out). Recordings of your own train a tokenizer "
            "and a model with `openmimo audio data`, `openmimo audio tokenizer` and `openmimo audio language`."
        )


def _recorded(corpus: Corpus, split: Split) -> list[Clip]:
    """The recordings of a split with a measurable length."""
    return [clip for clip in corpus.select(split, composed=False) if _LEAST_SECONDS < clip.seconds < _MOST_SECONDS]


def _of_others(corpus: Corpus) -> list[Clip]:
    return [clip for clip in corpus.select("other", with_text=True) if clip.seconds < _MOST_SECONDS]


def measure_tokenizer(corpus: Corpus, folder: Path, sounds: Path, count: int) -> dict[str, Any]:
    """Measures a tokenizer on held-out recordings.

    Args:
        corpus: The corpus.
        folder: The tokenizer.
        sounds: A folder for one clip as recorded and as decoded.
        count: Recordings.

    Returns:
        Lists by number of codebooks, the scores of the recordings themselves, perplexities, and streaming speed.
    """
    tokenizer, judge = load_audio_tokenizer(str(folder)), SpeakerJudge()
    clips = _recorded(corpus, "heldout")
    waveforms = [_read(corpus, clip) for clip in clips[:count]]
    voice = _training_voice(corpus, judge)
    rows = [_quality(tokenizer, judge, voice, waveforms, used) for used in range(1, tokenizer.config.num_codebooks + 1)]
    shown = max(range(len(waveforms)), key=lambda index: len(waveforms[index]))
    _write_decoded(tokenizer, waveforms[shown], sounds)
    return {
        "codebooks": rows,
        "seconds": sum(map(len, waveforms)) / SAMPLE_RATE,
        "clips": len(waveforms),
        "recorded_similarity": float(np.mean([judge.embed(samples, SAMPLE_RATE) @ voice for samples in waveforms])),
        "perplexity": _perplexities(tokenizer, waveforms),
        "shown": clips[shown].audio,
        **_speed(tokenizer, waveforms),
    }


def _read(corpus: Corpus, clip: Clip) -> np.ndarray:
    return read_audio(corpus.folder / clip.audio).samples_S


def _training_voice(corpus: Corpus, judge: SpeakerJudge) -> np.ndarray:
    """The mean embedding of training recordings of the voice."""
    clips = _recorded(corpus, "train")
    chosen = clips[:: max(1, len(clips) // _VOICE_CLIPS)][:_VOICE_CLIPS]
    return judge.voice([_read(corpus, clip) for clip in chosen], SAMPLE_RATE)


def _decoded(tokenizer: AudioTokenizer, samples_S: np.ndarray, codebooks: int) -> np.ndarray:
    codes_FQ = tokenizer.encode(torch.from_numpy(samples_S), codebooks)
    return tokenizer.decode(codes_FQ)[: len(samples_S)].numpy()


def _quality(
    tokenizer: AudioTokenizer, judge: SpeakerJudge, voice: np.ndarray, waveforms: Sequence[np.ndarray], used: int
) -> dict[str, float]:
    """Mean scores of recordings that are encoded with `used` codebooks and decoded."""
    scores: dict[str, list[float]] = {"mel": [], "si_sdr": [], "stoi": [], "similarity": []}
    for samples in waveforms:
        decoded = _decoded(tokenizer, samples, used)
        scores["mel"].append(_mel_distance(tokenizer, decoded, samples))
        scores["si_sdr"].append(si_sdr(decoded, samples))
        scores["stoi"].append(stoi(decoded, samples, SAMPLE_RATE))
        scores["similarity"].append(float(judge.embed(decoded, SAMPLE_RATE) @ voice))
    sizes = tokenizer.config.codebook_sizes[:used]
    bits = tokenizer.config.frames_per_second * float(np.log2(np.array(sizes)).sum())
    return {"bits_per_second": bits, **{name: float(np.mean(values)) for name, values in scores.items()}}


@torch.no_grad()
def _mel_distance(tokenizer: AudioTokenizer, decoded_S: np.ndarray, samples_S: np.ndarray) -> float:
    """Mean absolute difference of log-mel spectrograms, whose values are at least the natural logarithm of 1e-5."""
    logs = [torch.clamp(log_mel(tokenizer, samples), min=float(np.log(1e-5))) for samples in (decoded_S, samples_S)]
    return float((logs[0] - logs[1]).abs().mean())


@torch.no_grad()
def log_mel(tokenizer: AudioTokenizer, samples_S: np.ndarray) -> torch.Tensor:
    """Returns the log-mel spectrogram [frames, bands] of the released tokenizer, without an offset or scale."""
    transform = LogMel(
        sample_rate=tokenizer.config.sample_rate, fft_samples=960, window_samples=960, hop_samples=240, mel_bins=128
    )
    return transform(torch.from_numpy(samples_S)[None])[0]


def _perplexities(tokenizer: AudioTokenizer, waveforms: Sequence[np.ndarray]) -> list[float]:
    codes_FQ = torch.cat([tokenizer.encode(torch.from_numpy(samples)) for samples in waveforms])
    return [perplexity(codes_FQ[:, book], size) for book, size in enumerate(tokenizer.config.codebook_sizes)]


def _speed(tokenizer: AudioTokenizer, waveforms: Sequence[np.ndarray]) -> dict[str, float]:
    """Real-time factors of encoding and of streaming decode, patch by patch, and the time to the first samples."""
    samples = torch.from_numpy(np.concatenate(waveforms)[: 30 * SAMPLE_RATE])
    tokenizer.encode(samples[:SAMPLE_RATE])
    started = time.perf_counter()
    codes_FQ = tokenizer.encode(samples)
    encoded = time.perf_counter()
    first = None
    stream, decoding = tokenizer.stream(), time.perf_counter()
    for place in range(0, len(codes_FQ), 4):
        if len(stream.push(codes_FQ[place : place + 4])) and first is None:
            first = time.perf_counter() - decoding
    stream.finish()
    seconds = len(samples) / SAMPLE_RATE
    return {
        "encode_factor": (encoded - started) / seconds,
        "decode_factor": (time.perf_counter() - decoding) / seconds,
        "first_samples_seconds": first or 0.0,
    }


def _write_decoded(tokenizer: AudioTokenizer, samples_S: np.ndarray, sounds: Path) -> None:
    write_audio(sounds / "recorded.wav", samples_S)
    for used in (1, 2, 4, tokenizer.config.num_codebooks):
        write_audio(sounds / f"decoded-{used}.wav", _decoded(tokenizer, samples_S, used))


# --- the language model ----------------------------------------------------------------------------------------------


def measure_hearing(corpus: Corpus, model: Path, count: int) -> dict[str, Any]:
    """Transcribes held-out composed sentences, and recordings of other voices.

    Returns:
        The texts, error rates of words and characters, and those against shuffled references.
    """
    engine = AudioEngine(model)
    clips = corpus.select("heldout", composed=True, with_text=True)[:count]
    others = _of_others(corpus)
    result: dict[str, Any] = {}
    for name, chosen in (("heldout", clips), ("other_voices", others)):
        texts = [engine.transcribe(_read(corpus, clip), SAMPLE_RATE, max_tokens=64) for clip in chosen]
        result[name] = _errors(texts, [clip.text or "" for clip in chosen])
    return result


def _errors(found: list[str], references: list[str]) -> dict[str, Any]:
    words = [text.split() for text in found], [text.split() for text in references]
    return {
        "found": found,
        "references": references,
        "word_error": error_rate(*words),
        "character_error": error_rate(found, references),
        "chance_word_error": chance_error_rate(*words),
        "chance_character_error": chance_error_rate(found, references),
        "exact": sum(a == b for a, b in zip(found, references, strict=True)) / len(found),
    }


def measure_speech(corpus: Corpus, model: Path, sounds: Path, count: int) -> dict[str, Any]:
    """Speaks the texts of held-out sentences and asks the judge whose voice it is.

    Speech is attributed to the training voice if that is the nearest of all voices of the corpus, and the similarity is
    above the middle between that of recordings of the voice and that of recordings of others. Random codes are judged
    for comparison. The model's own transcription of its speech is scored as well; it is not independent of the speech.

    Returns:
        Similarities by voice, the share attributed to the training voice, error rates of its own transcription, speed.
    """
    engine, judge = AudioEngine(model), SpeakerJudge()
    clips = corpus.select("heldout", composed=True, with_text=True)[:count]
    voices = {TRAINING_VOICE: _training_voice(corpus, judge)}
    others = []
    for name in sorted({clip.voice for clip in corpus.select("other")}):
        recordings = [_read(corpus, clip) for clip in corpus.clips if clip.voice == name]
        voices[name] = judge.voice(recordings, SAMPLE_RATE)
        others += [float(judge.embed(samples, SAMPLE_RATE) @ voices[TRAINING_VOICE]) for samples in recordings]
    texts = [clip.text or "" for clip in clips]
    spoken: list[np.ndarray] = []
    first: list[float] = []
    seconds = 0.0
    for number, text in enumerate(texts):
        started = time.perf_counter()
        parts = list(_timed(engine.speak(text, params=AudioParams(max_tokens=128, seed=number)), started, first))
        seconds += time.perf_counter() - started
        spoken.append(np.concatenate(parts) if parts else np.zeros(1, np.float32))
        write_audio(sounds / f"spoken-{number}.wav", spoken[-1])
        write_audio(sounds / f"composed-{number}.wav", _read(corpus, clips[number]))
    similar = [
        {name: float(judge.embed(samples, SAMPLE_RATE) @ voice) for name, voice in voices.items()} for samples in spoken
    ]
    recorded = [float(judge.embed(_read(corpus, clip), SAMPLE_RATE) @ voices[TRAINING_VOICE]) for clip in clips]
    threshold = float(np.mean(recorded) + np.mean(others)) / 2
    noise = judge.embed(_random_speech(model / CODEC_FOLDER), SAMPLE_RATE) @ voices[TRAINING_VOICE]
    heard = [engine.transcribe(samples, SAMPLE_RATE, max_tokens=64) for samples in spoken]
    return {
        "texts": texts,
        "similarities": similar,
        "recorded_similarity": float(np.mean(recorded)),
        "other_similarity": float(np.mean(others)),
        "random_similarity": float(noise),
        "threshold": threshold,
        "attributed": sum(_is_of_voice(row, threshold) for row in similar) / len(similar),
        "own_transcription": _errors(heard, texts),
        "seconds": sum(map(len, spoken)) / SAMPLE_RATE,
        "factor": seconds / max(1e-9, sum(map(len, spoken)) / SAMPLE_RATE),
        "first_samples_seconds": float(np.median(first)) if first else 0.0,
    }


def _is_of_voice(similarities: dict[str, float], threshold: float) -> bool:
    nearest = max(similarities, key=similarities.__getitem__)
    return nearest == TRAINING_VOICE and similarities[nearest] > threshold


def _random_speech(folder: Path) -> np.ndarray:
    """Three seconds that a tokenizer decodes from random codes."""
    tokenizer = load_audio_tokenizer(str(folder))
    generator = torch.Generator().manual_seed(0)
    frames = round(3 * tokenizer.config.frames_per_second)
    codes = [torch.randint(size, (frames,), generator=generator) for size in tokenizer.config.codebook_sizes]
    return tokenizer.decode(torch.stack(codes, dim=1)).numpy()


def _timed(parts: Iterator[np.ndarray], started: float, first: list[float]) -> Iterator[np.ndarray]:
    """The parts; the time of the first one is appended to `first`."""
    for number, part in enumerate(parts):
        if number == 0:
            first.append(time.perf_counter() - started)
        yield part
