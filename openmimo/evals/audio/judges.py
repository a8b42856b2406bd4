"""Judges of spoken answers, which hear without the model that is evaluated."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from openmimo.core.errors import ConfigError
from openmimo.core.registry import load_object
from openmimo.data.audio.files import SAMPLE_RATE, optional_module, pcm_bytes, resample
from openmimo.evals.audio.sounds import mel, nearest
from openmimo.evals.audio.task import Sound

_POCKETSPHINX_RATE = 16_000


class TextJudge(Protocol):
    """Writes down what it hears."""

    def hear(self, sound: Sound, candidates: Sequence[tuple[str, Sound]]) -> str:
        """Return the text of a sound. `candidates` are known texts with their sound, the right one among them."""


class TemplateJudge:
    """Chooses the candidate whose sound is nearest, by dynamic time warping of log-mel spectrograms."""

    def hear(self, sound: Sound, candidates: Sequence[tuple[str, Sound]]) -> str:
        """As `TextJudge.hear`."""
        return candidates[nearest(sound, [one for _, one in candidates], warped=True)][0]


class PocketSphinxJudge:
    """The recognizer of PocketSphinx with the English models of its package; it needs no candidates.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self) -> None:
        self._decoder = optional_module("pocketsphinx", "audio-evals").Decoder(
            samprate=_POCKETSPHINX_RATE, loglevel="FATAL"
        )

        self._text_of = lru_cache(maxsize=256)(self._decode)  # references are heard several times

    def hear(self, sound: Sound, candidates: Sequence[tuple[str, Sound]]) -> str:
        """As `TextJudge.hear`."""
        return self._text_of(sound)

    def _decode(self, sound: Sound) -> str:
        samples = resample(sound.waveform, SAMPLE_RATE, _POCKETSPHINX_RATE)
        if not len(samples):
            return ""
        self._decoder.start_utt()
        self._decoder.process_raw(pcm_bytes(samples), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else str(found.hypstr)


TEXT_JUDGES: dict[str, type[TemplateJudge] | type[PocketSphinxJudge]] = {
    "templates": TemplateJudge,
    "pocketsphinx": PocketSphinxJudge,
}


def text_judge(name: str) -> TextJudge:
    """Return a judge of texts by name."""
    if name not in TEXT_JUDGES:
        raise ConfigError(f"judge is {name!r}; give one of {', '.join(TEXT_JUDGES)}.")
    return TEXT_JUDGES[name]()


class VoiceJudge(Protocol):
    """Describes the voice of a sound."""

    def embed(self, samples_S: np.ndarray, sample_rate: int) -> np.ndarray:
        """Return a vector of length 1. Vectors of one voice are near each other."""


class SpectrumJudge:
    """Describes a voice by its mean spectrum: enough for voices of different pitch, not for similar people."""

    def embed(self, samples_S: np.ndarray, sample_rate: int) -> np.ndarray:
        """As `VoiceJudge.embed`, from the frames that are not silent."""
        mel_LM = mel(Sound(resample(samples_S, sample_rate, SAMPLE_RATE)))
        levels = mel_LM.mean(axis=1)
        mean_M = mel_LM[levels >= levels.mean()].mean(axis=0)
        centered = mean_M - mean_M.mean()
        return centered / max(float(np.linalg.norm(centered)), 1e-9)


def voice_judge(name: str) -> VoiceJudge:
    """Return "spectrum", or an object `package.module:Class` that is made without arguments."""
    return SpectrumJudge() if name == "spectrum" else load_object(name)()


class Similarities:
    """Compares voices. The vector of each sound is computed once."""

    def __init__(self, judge: VoiceJudge):
        self._vector = lru_cache(maxsize=512)(lambda sound: judge.embed(sound.waveform, SAMPLE_RATE))

    def __call__(self, one: Sound, other: Sound) -> float:
        """Return the cosine of two voices; 0 if one sound is empty."""
        if not len(one.waveform) or not len(other.waveform):
            return 0.0
        return float(self._vector(one) @ self._vector(other))
