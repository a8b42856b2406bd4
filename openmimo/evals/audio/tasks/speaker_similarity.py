"""Whether speech has the voice of a recording that the model was given."""

import random
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.evals.audio.judges import Similarities, voice_judge
from openmimo.evals.audio.task import Answer, AudioExample, AudioTask, Measures, Sound
from openmimo.evals.audio.voices import TONES, open_voices

_COMPARED = 3  # recordings of each voice with which an answer is compared


@dataclass(frozen=True)
class SpeakerOptions:
    """Settings of the task.

    Attributes:
        voices: tones, or a corpus of `openmimo audio data` with several voices.
        judge: spectrum (the mean spectrum), or `package.module:Class` with a method `embed(samples, sample_rate)`, as
            openmimo.demo.audio.judge:SpeakerJudge, the speaker encoder of Resemblyzer.
    """

    voices: str = TONES
    judge: str = "spectrum"


@dataclass(frozen=True)
class _Choice:
    """Recordings of each voice, and the place of the right one."""

    recordings: tuple[tuple[Sound, ...], ...]
    right: int


class _SpeakerSimilarity:
    num_examples = None

    def __init__(self, options: SpeakerOptions, seed: int):
        voices = open_voices(options.voices, seed)
        self._sentences = [list(voices.sentences(name)) for name in voices.names]
        self._sentences = [sentences for sentences in self._sentences if len(sentences) >= _COMPARED + 2]
        if len(self._sentences) < 2:
            raise ConfigError(f"{options.voices} has enough sentences of one voice only; the task needs two.")
        self._similar = Similarities(voice_judge(options.judge))
        self.judge = options.judge
        self.chance = 1 / len(self._sentences)
        self._seed = seed

    def example(self, index: int) -> AudioExample:
        source = random.Random(f"{self._seed}:{index}")
        right = index % len(self._sentences)
        (_, given), (text, reference) = source.sample(self._sentences[right], 2)
        # the judge compares with other recordings than the one that the model was given
        recordings = tuple(
            tuple(source.sample([sound for _, sound in sentences if sound not in (given, reference)], _COMPARED))
            for sentences in self._sentences
        )
        choice = _Choice(recordings, right)
        return AudioExample("speak", (given, text), "sound", Answer(text, reference), max_tokens=512, details=choice)

    def measures(self, example: AudioExample, answer: Answer) -> Measures:
        found = [self._similarity(answer.heard, recordings) for recordings in example.details.recordings]
        right = example.details.right
        others = [value for place, value in enumerate(found) if place != right]
        return {
            "score": (float(found[right] > max(others)), 1.0),
            "similarity": (found[right], 1.0),
            "similarity_of_others": (sum(others) / len(others), 1.0),
        }

    def _similarity(self, sound: Sound, recordings: tuple[Sound, ...]) -> float:
        return sum(self._similar(sound, recording) for recording in recordings) / len(recordings)


PLUGIN = AudioTask(version=1, options=SpeakerOptions, open=_SpeakerSimilarity)
