"""What a speech corpus contains, without torch."""

from dataclasses import dataclass

from openmimo.core.errors import ConfigError


@dataclass(frozen=True)
class CorpusConfig:
    """Write a speech corpus: Debian's telephone prompts, or recordings of your own.

    Attributes:
        sounds: A folder with recordings of your own (wav, flac, ogg, mp3, g722), each with its words in a file of the
            same name that ends in .txt. Default: the prompts of Debian's asterisk-core-sounds-en-g722, one voice.
        transcripts: A file with a line "name: words" for each recording (core-sounds-en.txt of Asterisk's archive has
            this form). Default for the prompts: the words of files whose name determines them.
        composed: Number of sentences composed of the recordings of words, for training; a twentieth of it is held out.
        held_out: Share of clips and sentences that are held out.
        max_seconds: Longest recording.
        seed: Seed of the composed sentences.
    """

    sounds: str | None = None
    transcripts: str | None = None
    composed: int = 1600
    held_out: float = 0.1
    max_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or self.composed < 0 or self.max_seconds <= 0:
            raise ConfigError("held_out must lie between 0 and 1, composed be at least 0, and max_seconds above 0.")
