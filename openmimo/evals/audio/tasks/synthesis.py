"""Word errors of synthesized speech, as a judge hears it.

The judge "templates" chooses among the right sentence and others, so it cannot hear a word that is in none of them. The
judge "pocketsphinx" writes any English words.
"""

import random
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.evals.audio.judges import text_judge
from openmimo.evals.audio.measures import text_errors
from openmimo.evals.audio.task import Answer, AudioExample, AudioTask, Measures
from openmimo.evals.audio.voices import TONES, open_voices


@dataclass(frozen=True)
class SynthesisOptions:
    """Settings of the task.

    Attributes:
        voices: tones, or a corpus of `openmimo audio data`, whose held-out sentences are spoken.
        judge: templates (the nearest of known sentences), or pocketsphinx (English recordings only).
        candidates: Sentences among which templates chooses.
    """

    voices: str = TONES
    judge: str = "templates"
    candidates: int = 8


class _Synthesis:
    chance = None

    def __init__(self, options: SynthesisOptions, seed: int):
        if options.candidates < 2:
            raise ConfigError(f"candidates is {options.candidates}; a judge needs at least 2.")
        self._judge = text_judge(options.judge)
        self.judge = options.judge
        if options.judge == "templates":
            self.judge = f"templates, {options.candidates} sentences"
        self._sentences = open_voices(options.voices, seed).sentences()
        self.num_examples = len(self._sentences)
        self._num_others = min(options.candidates, self.num_examples) - 1
        self._seed = seed

    def example(self, index: int) -> AudioExample:
        text, sound = self._sentences[index]
        others = [one for number, one in enumerate(self._sentences) if number != index]
        chosen = random.Random(f"{self._seed}:{index}").sample(others, self._num_others)
        return AudioExample(
            "speak", (text,), "sound", Answer(text, sound), max_tokens=512, details=[*chosen, (text, sound)]
        )

    def measures(self, example: AudioExample, answer: Answer) -> Measures:
        heard = self._judge.hear(answer.heard, example.details) if len(answer.heard.waveform) else ""
        return text_errors(heard, example.reference.text) | {"right": (float(heard == example.reference.text), 1.0)}


PLUGIN = AudioTask(version=1, options=SynthesisOptions, open=_Synthesis)
