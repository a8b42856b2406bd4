"""Word and character errors of transcriptions."""

from dataclasses import dataclass

from openmimo.evals.audio.measures import text_errors
from openmimo.evals.audio.task import Answer, AudioExample, AudioTask, Measures
from openmimo.evals.audio.voices import TONES, open_voices


@dataclass(frozen=True)
class TranscriptionOptions:
    """Settings of the task.

    Attributes:
        voices: tones, or a corpus of `openmimo audio data`, whose held-out recordings are transcribed.
    """

    voices: str = TONES


class _Transcription:
    judge = "edit distance"
    chance = None

    def __init__(self, options: TranscriptionOptions, seed: int):
        self._sentences = open_voices(options.voices, seed).sentences()
        self.num_examples = len(self._sentences)

    def example(self, index: int) -> AudioExample:
        text, sound = self._sentences[index]
        return AudioExample("transcribe", (sound,), "text", Answer(text))

    def measures(self, example: AudioExample, answer: Answer) -> Measures:
        return text_errors(answer.text, example.reference.text)


PLUGIN = AudioTask(version=1, options=TranscriptionOptions, open=_Transcription)
