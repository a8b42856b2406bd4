"""Configuration of the speech demo. Imports no torch."""

from dataclasses import dataclass

from openmimo.core.fields import PositiveInt, check_fields
from openmimo.data.audio.config import CorpusConfig
from openmimo.train.audio.config import AudioTrainConfig
from openmimo.train.audio.tokenizer.config import AudioTokenizerTrainConfig


@dataclass(frozen=True)
class AudioDemoConfig:
    """Train an audio tokenizer and an audio language model on real speech, and measure both on held-out speech.

    Attributes:
        folder: Folder of results, sounds and report. Finished parts are kept, and the same command resumes a demo.
        corpus: The speech.
        tokenizer: Training of the audio tokenizer.
        decoder: Further training of its decoder; the codes remain the same.
        language: Training of the language model, which transcribes and speaks.
        measured_clips: Held-out recordings from which the tokenizer is measured.
        transcribed: Held-out sentences that the model transcribes.
        spoken: Held-out sentences that the model speaks.
        threads: CPU threads of the measurements (None: all cores).
    """

    folder: str
    corpus: CorpusConfig
    tokenizer: AudioTokenizerTrainConfig
    decoder: AudioTokenizerTrainConfig
    language: AudioTrainConfig
    measured_clips: PositiveInt = 16
    transcribed: PositiveInt = 40
    spoken: PositiveInt = 12
    threads: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self, "the demo")
