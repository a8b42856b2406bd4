"""Few-shot conversions of sound to sound: pairs of an input and its conversion, and a last input.

The answer is right if it is nearer to the computed conversion than to the other candidates.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from openmimo.core.errors import ConfigError
from openmimo.evals.audio.sounds import mel_distance
from openmimo.evals.audio.task import Answer, AudioExample, Measures, Sound
from openmimo.evals.audio.voices import TONES, open_voices

_NUM_OTHERS = 3


@dataclass(frozen=True)
class ConversionOptions:
    """Settings of the task.

    Attributes:
        voices: tones, or a corpus of `openmimo audio data`.
        shots: Pairs before the last input.
        most_seconds: Longest recording.
    """

    voices: str = TONES
    shots: int = 4
    most_seconds: float = 3.0

    def __post_init__(self) -> None:
        if self.shots < 1 or self.most_seconds <= 0:
            raise ConfigError("shots must be at least 1, and most_seconds above 0.")


@dataclass(frozen=True)
class Converted:
    """One input.

    Attributes:
        given: The input.
        target: Its conversion.
        others: Other conversions, which are wrong.
    """

    given: Sound
    target: Sound
    others: tuple[Sound, ...]


class Conversion(Protocol):
    """A rule for the examples of one prompt."""

    def __call__(self, sound: Sound, others: tuple[Sound, ...], source: np.random.Generator, choice: int) -> Converted:
        """Convert a sound.

        Args:
            sound: The sound.
            others: Sounds that are not in the prompt, for wrong candidates.
            source: Random numbers.
            choice: Selects the rule; the same for all pairs of a prompt.
        """


class FewShot:
    """The task of a conversion.

    Args:
        options: The options.
        seed: The seed.
        convert: The conversion.
        num_choices: Number of rules.
        chance: Expected score of an answer that ignores the prompt.
    """

    judge = "nearest log-mel spectrogram"
    num_examples = None

    def __init__(self, options: ConversionOptions, seed: int, convert: Conversion, *, num_choices: int, chance: float):
        self._sounds = [
            sound
            for _, sound in open_voices(options.voices, seed, most_seconds=options.most_seconds).sentences()
            if sound.seconds <= options.most_seconds
        ]
        if len(self._sounds) < options.shots + 1 + _NUM_OTHERS:
            raise ConfigError(f"{options.voices} has {len(self._sounds)} sentences, too few for {options.shots} shots.")
        self.chance = chance
        self._shots, self._seed, self._convert, self._num_choices = options.shots, seed, convert, num_choices

    def example(self, index: int) -> AudioExample:
        """As `OpenTask.example`."""
        source = np.random.default_rng((self._seed, index))
        rule = int(source.integers(self._num_choices))
        chosen = source.choice(len(self._sounds), self._shots + 1 + _NUM_OTHERS, replace=False)
        sounds = [self._sounds[number] for number in chosen]
        others = tuple(sounds[self._shots + 1 :])
        *pairs, last = [self._convert(sound, others, source, rule) for sound in sounds[: self._shots + 1]]
        parts = tuple(sound for pair in pairs for sound in (pair.given, pair.target))
        reference = Answer(sound=last.target)
        most = 16 + int(last.target.seconds * 12)  # patches of 0.16 s, doubled
        return AudioExample("continue", (*parts, last.given), "sound", reference, max_tokens=most, details=last)

    def measures(self, example: AudioExample, answer: Answer) -> Measures:
        """As `OpenTask.measures`."""
        last: Converted = example.details
        sound = answer.heard
        distance = mel_distance(sound, last.target)
        is_right = len(sound.waveform) > 0 and all(distance < mel_distance(sound, other) for other in last.others)
        return {
            "score": (float(is_right), 1.0),
            "mel_distance": (distance, 1.0),
            "mel_distance_of_input": (mel_distance(last.given, last.target), 1.0),
            "seconds_by_target": (sound.seconds, last.target.seconds),
        }
