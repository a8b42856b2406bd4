"""Sources of speech whose words are known: a language of tones, and the recordings of a corpus."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.audio.corpus import Clip, read_corpus
from openmimo.data.audio.files import SAMPLE_RATE, read_audio
from openmimo.data.audio.words import compose
from openmimo.evals.audio.sounds import joined
from openmimo.evals.audio.task import Sound

TONES = "tones"
_LETTER_SECONDS, _PAUSE_SECONDS = 0.05, 0.06
_LOW, _HIGH = (420.0, 500.0, 600.0, 710.0, 850.0, 1000.0), (1250.0, 1550.0, 1900.0, 2350.0, 2900.0, 3600.0)
_SYMBOLS = "abcdefghijklmnopqrstuvwxyz0123456789"
_PITCHES = {"low": 0.75, "middle": 1.0, "high": 1.33}


class Voices(Protocol):
    """A source of speech."""

    @property
    def names(self) -> Sequence[str]:
        """The voices."""

    def say(self, text: str, voice: str | None = None) -> Sound:
        """Return a text spoken by a voice (None: the first). Raises DataError for words that it cannot say."""

    def sentences(self, voice: str | None = None) -> Sequence[tuple[str, Sound]]:
        """Return different sentences with their sound."""


class ToneVoices:
    """A language of tones: a letter is a pair of tones, a space is a pause. Its voices differ in pitch.

    It needs no recordings, and any text can be said. A model has to be trained on it.

    Args:
        seed: Determines the sentences.
        count: Number of sentences.
    """

    def __init__(self, seed: int, count: int):
        self.names = tuple(_PITCHES)
        source = random.Random(seed)
        texts = dict.fromkeys(" ".join(compose(source)) for _ in range(4 * count))
        self._texts = [text for text in texts if len(text) <= 40][:count]

    def say(self, text: str, voice: str | None = None) -> Sound:
        """As `Voices.say`."""
        pitch = _PITCHES[voice or "middle"]
        words = [[symbol for symbol in word if symbol in _SYMBOLS] for word in text.lower().split()]
        if not all(words) or not words:
            raise DataError(f"{text!r} cannot be said in tones; it needs letters or digits in every word.")
        return joined([np.concatenate([_tone(symbol, pitch) for symbol in word]) for word in words], _PAUSE_SECONDS)

    def sentences(self, voice: str | None = None) -> Sequence[tuple[str, Sound]]:
        """As `Voices.sentences`."""
        return [(text, self.say(text, voice)) for text in self._texts]


class RecordedVoices:
    """The held-out recordings of a corpus, and sentences of its recorded words.

    Args:
        folder: A corpus of `openmimo audio data`.
        most_seconds: Longer recordings are left out.

    Raises:
        DataError: The folder is no corpus, or has no held-out recordings with words.
    """

    def __init__(self, folder: str, most_seconds: float):
        corpus = read_corpus(folder)
        self._folder = Path(folder)
        with_text = [clip for clip in corpus.clips if clip.text and clip.seconds <= most_seconds]
        self._heard = [clip for clip in with_text if clip.split != "train"]
        if not self._heard:
            raise DataError(f"{folder} has no held-out recordings of at most {most_seconds:g} s with their words.")
        self._words: dict[str, dict[str, Clip]] = {}
        for clip in with_text:
            if not clip.is_composed:
                self._words.setdefault(clip.voice, {}).setdefault(str(clip.text), clip)
        self.names = tuple(dict.fromkeys(clip.voice for clip in with_text))

    def say(self, text: str, voice: str | None = None) -> Sound:
        """As `Voices.say`: the recordings of the longest known phrases, one after another."""
        known = self._words.get(voice or self.names[0], {})
        left, pieces = text.split(), []
        while left:
            lengths = range(len(left), 0, -1)
            length = next((size for size in lengths if " ".join(left[:size]) in known), None)
            if length is None:
                raise DataError(f"The corpus has no recording of {left[0]!r} by {voice or self.names[0]}.")
            pieces.append(self._read(known[" ".join(left[:length])]).waveform)
            left = left[length:]
        return joined(pieces, _PAUSE_SECONDS)

    def sentences(self, voice: str | None = None) -> Sequence[tuple[str, Sound]]:
        """As `Voices.sentences`: the held-out recordings of a voice, each text once."""
        by_text = {str(clip.text): clip for clip in self._heard if clip.voice == (voice or self.names[0])}
        return [(text, self._read(clip)) for text, clip in by_text.items()]

    def _read(self, clip: Clip) -> Sound:
        return Sound(read_audio(self._folder / clip.audio).samples_S)


def open_voices(name: str, seed: int, *, count: int = 64, most_seconds: float = 12.0) -> Voices:
    """Return "tones", or the voices of a corpus folder."""
    if name == TONES:
        return ToneVoices(seed, count)
    if not Path(name).is_dir():
        raise ConfigError(f"voices is {name!r}; give {TONES}, or a folder that `openmimo audio data` wrote.")
    return RecordedVoices(name, most_seconds)


def _tone(symbol: str, pitch: float) -> np.ndarray:
    row, column = divmod(_SYMBOLS.index(symbol), len(_HIGH))
    times = np.arange(int(_LETTER_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    tones = sum(np.sin(2 * np.pi * pitch * frequency * times) for frequency in (_LOW[row], _HIGH[column]))
    return (0.25 * tones * np.hanning(len(times))).astype(np.float32)
