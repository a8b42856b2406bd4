"""Computed conversions of sound, and distances between sounds. S samples, L frames, M bands."""

from functools import cache, lru_cache

import numpy as np
import torch

from openmimo.data.audio.files import SAMPLE_RATE, resample
from openmimo.evals.audio.task import Sound
from openmimo.model.audio.mel import LogMel

_HOP, _FFT, _BANDS = 480, 1024, 40
_SMALLEST = 1e-3  # about -60 dB of full scale: quieter differences are not heard


def silence(seconds: float) -> np.ndarray:
    """Return samples of 0."""
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)


def joined(pieces: list[np.ndarray], pause_seconds: float) -> Sound:
    """Return pieces of sound with pauses between them."""
    spaced = [part for piece in pieces for part in (silence(pause_seconds), piece)]
    return Sound(np.concatenate(spaced[1:]) if pieces else silence(pause_seconds))


def at_speed(sound: Sound, speed: float) -> Sound:
    """Return a sound played at another speed; its pitch changes in the same measure."""
    return Sound(resample(sound.waveform, round(SAMPLE_RATE * speed), SAMPLE_RATE))


def with_noise(sound: Sound, decibels: float, source: np.random.Generator) -> Sound:
    """Return a sound with white noise, whose level lies `decibels` below that of the sound."""
    level = float(np.sqrt(np.mean(np.square(sound.waveform, dtype=np.float64)))) * 10 ** (-decibels / 20)
    noise = source.standard_normal(len(sound.waveform)) * level
    return Sound((sound.waveform + noise).astype(np.float32))


@cache
def _log_mel() -> LogMel:
    return LogMel(
        sample_rate=SAMPLE_RATE, fft_samples=_FFT, window_samples=_FFT, hop_samples=_HOP, mel_bins=_BANDS,
        smallest=_SMALLEST,
    )  # fmt: skip


@lru_cache(maxsize=256)  # a recording is compared with many answers
def mel(sound: Sound) -> np.ndarray:
    """Return the log-mel spectrogram [L, M], 50 frames a second."""
    waveform = sound.waveform if len(sound.waveform) else silence(0.02)
    return _log_mel()(torch.from_numpy(waveform)[None])[0].numpy()


def mel_distance(one: Sound, other: Sound) -> float:
    """Return the mean difference of log-mel spectrograms, frame by frame. Silence follows the shorter sound."""
    a, b = mel(one), mel(other)
    length = max(len(a), len(b))
    return float(np.abs(_to_length(a, length) - _to_length(b, length)).mean())


def warped_distance(one: Sound, other: Sound) -> float:
    """Return the mean cosine distance of two sounds along the best alignment (dynamic time warping).

    The mean spectrum of each sound is subtracted, so that the loudness and the channel matter little.
    """
    a, b = _directions(mel(one)), _directions(mel(other))
    costs = 1.0 - a @ b.T
    total = _warped(costs)
    return total / (len(a) + len(b))


def nearest(sound: Sound, candidates: list[Sound], *, warped: bool) -> int:
    """Return the index of the nearest candidate; the first one if the sound is empty."""
    if not len(sound.waveform):
        return 0
    distance = warped_distance if warped else mel_distance
    return int(np.argmin([distance(sound, candidate) for candidate in candidates]))


def _to_length(mel_LM: np.ndarray, length: int) -> np.ndarray:
    return np.pad(mel_LM, ((0, length - len(mel_LM)), (0, 0)), constant_values=np.log(_SMALLEST))


def _directions(mel_LM: np.ndarray) -> np.ndarray:
    centered = mel_LM - mel_LM.mean(axis=0)
    return centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-6)


def _warped(costs: np.ndarray) -> float:
    """The least sum of costs along a path from the first to the last pair of frames; diagonal steps count twice.

    The table is filled by anti-diagonals, each of which depends only on the two before it.
    """
    rows, columns = costs.shape
    skewed = np.full((rows + columns - 1, rows), np.inf)
    for row in range(rows):
        skewed[row : row + columns, row] = costs[row]
    before, last = np.full(rows, np.inf), np.full(rows, np.inf)
    last[0] = skewed[0, 0]
    for number in range(1, rows + columns - 1):
        cost = skewed[number]
        above = np.concatenate([[np.inf], last[:-1]])
        diagonal = np.concatenate([[np.inf], before[:-1]])
        before, last = last, np.minimum(np.minimum(last, above) + cost, diagonal + 2 * cost)
    return float(last[-1])
