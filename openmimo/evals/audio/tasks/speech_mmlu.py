"""Questions with four options in four forms: speech or text in, speech or text out (after SpeechMMLU).

The questions are about generated facts whose words all telephone prompts have: sums, days, months, and letters of the
radio alphabet. An answer repeats one of the options. A spoken answer is the option whose sound is nearest; a written
one is the option that comes first in it.
"""

import random
from dataclasses import dataclass
from typing import Literal

from openmimo.core.errors import ConfigError
from openmimo.data.audio.facts import NUM_OPTIONS, question
from openmimo.evals.audio.measures import normalized
from openmimo.evals.audio.sounds import nearest
from openmimo.evals.audio.task import Answer, AudioExample, AudioTask, Measures, Part
from openmimo.evals.audio.voices import TONES, open_voices


@dataclass(frozen=True)
class SpeechMmluOptions:
    """Settings of the task.

    Attributes:
        form: s2s, s2t, t2s or t2t: speech or text in, speech or text out.
        voices: tones, or a corpus of `openmimo audio data`.
    """

    form: Literal["s2s", "s2t", "t2s", "t2t"] = "s2t"
    voices: str = TONES


class _SpeechMmlu:
    chance = 1 / NUM_OPTIONS
    num_examples = None

    def __init__(self, options: SpeechMmluOptions, seed: int):
        if options.form not in ("s2s", "s2t", "t2s", "t2t"):
            raise ConfigError(f"form is {options.form!r}; give s2s, s2t, t2s or t2t.")
        self._hears, self._speaks = options.form[0] == "s", options.form[2] == "s"
        self.judge = "templates, 4 options" if self._speaks else "the first option in the text"
        self._voices = open_voices(options.voices, seed, count=1)
        self._seed = seed

    def example(self, index: int) -> AudioExample:
        source = random.Random(f"{self._seed}:{index}")
        asked = question(source)
        options, right = asked.options, asked.right
        parts: tuple[Part, ...] = (f"{asked.text}: {', '.join(options)}?",)
        if self._hears:
            parts = (self._voices.say(asked.spoken),)
        sounds = [self._voices.say(option) for option in options]
        reference = Answer(right, sounds[options.index(right)] if self._speaks else None)
        answers_with: Literal["sound", "text"] = "sound" if self._speaks else "text"
        return AudioExample("chat", parts, answers_with, reference, max_tokens=64, details=(options, sounds))

    def measures(self, example: AudioExample, answer: Answer) -> Measures:
        options, sounds = example.details
        if self._speaks:
            chosen = options[nearest(answer.heard, sounds, warped=True)] if len(answer.heard.waveform) else ""
        else:
            words = normalized(answer.text).split()
            chosen = next((word for word in words if word in options), "")
        return {
            "score": (float(chosen == example.reference.text), 1.0),
            "answered": (float(bool(chosen)), 1.0),
        }


PLUGIN = AudioTask(version=1, options=SpeechMmluOptions, open=_SpeechMmlu)
