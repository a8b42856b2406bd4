"""Questions with four options in four forms: speech or text in, speech or text out (after SpeechMMLU).

The questions are about generated facts whose words all telephone prompts have: sums, days, months, and letters of the
radio alphabet. An answer repeats one of the options. A spoken answer is the option whose sound is nearest; a written
one is the option that comes first in it.
"""

import random
from dataclasses import dataclass
from typing import Literal

from openmimo.core.errors import ConfigError
from openmimo.evals.audio.measures import normalized
from openmimo.evals.audio.sounds import nearest
from openmimo.evals.audio.task import Answer, AudioExample, AudioTask, Measures, Part
from openmimo.evals.audio.voices import TONES, open_voices

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
            "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
           "november", "december")  # fmt: skip
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
             "eleventh", "twelfth")  # fmt: skip
_RADIO = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima",
          "mike", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "yankee",
          "zulu")  # fmt: skip
_NUM_OPTIONS = 4


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
    chance = 1 / _NUM_OPTIONS
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
        question, right, pool = source.choice(_FACTS)(source)
        options = [right, *source.sample([word for word in pool if word != right], _NUM_OPTIONS - 1)]
        source.shuffle(options)
        text = f"{question} {' '.join(options)}"
        parts: tuple[Part, ...] = (f"{question}: {', '.join(options)}?",)
        if self._hears:
            parts = (self._voices.say(text),)
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


_Fact = tuple[str, str, tuple[str, ...]]


def _sum(source: random.Random) -> _Fact:
    one, other = source.randrange(10), source.randrange(10)
    return f"{_NUMBERS[one]} plus {_NUMBERS[other]} equals", _NUMBERS[one + other], _NUMBERS


def _difference(source: random.Random) -> _Fact:
    one = source.randrange(20)
    other = source.randrange(min(one, 9) + 1)
    return f"{_NUMBERS[one]} minus {_NUMBERS[other]} equals", _NUMBERS[one - other], _NUMBERS


def _tomorrow(source: random.Random) -> _Fact:
    day = source.randrange(7)
    word, step = source.choice((("tomorrow", 1), ("yesterday", -1)))
    return f"today is {_DAYS[day]} {word} is", _DAYS[(day + step) % 7], _DAYS


def _month(source: random.Random) -> _Fact:
    month = source.randrange(12)
    return f"{_MONTHS[month]} is", _ORDINALS[month], _ORDINALS


def _letter(source: random.Random) -> _Fact:
    word = source.choice(_RADIO)
    return f"{word[0]} is", word, _RADIO


_FACTS = (_sum, _difference, _tomorrow, _month, _letter)
PLUGIN = AudioTask(version=1, options=SpeechMmluOptions, open=_SpeechMmlu)
