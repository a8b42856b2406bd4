"""The interface of audio tasks: a file in `openmimo/evals/audio/tasks` exports `PLUGIN`, an AudioTask.

An example is a pure function of options, seed and index. Every measure of an answer is a fraction, so that a result
over several examples is the sum of the numerators by the sum of the denominators: a word error rate counts errors by
words, and a share of right answers counts ones by examples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from openmimo.core.registry import Registry
from openmimo.data.audio.files import SAMPLE_RATE

Fraction: TypeAlias = tuple[float, float]
Measures: TypeAlias = Mapping[str, Fraction]
SCORE = "score"
SHARES = (SCORE, "right", "answered")  # measures that count examples


@dataclass(frozen=True, eq=False)
class Sound:
    """A waveform at `SAMPLE_RATE`, float32."""

    waveform: np.ndarray

    @property
    def seconds(self) -> float:
        """The length."""
        return len(self.waveform) / SAMPLE_RATE


Part: TypeAlias = str | Sound


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model answers, or the reference.

    Attributes:
        text: The text; "" for an answer of sound alone.
        sound: The sound; None for an answer of text.
    """

    text: str = ""
    sound: Sound | None = None

    @property
    def heard(self) -> Sound:
        """The sound, which is empty if there is none."""
        return self.sound or Sound(np.zeros(0, np.float32))


@dataclass(frozen=True, eq=False)
class AudioExample:
    """One question.

    Attributes:
        kind: What the model does: transcribe the only part, speak it (after a sound, with its voice), answer the parts
            as a user's turn, or continue them by another sound.
        parts: The prompt.
        answers_with: Whether the answer is text or sound.
        reference: An answer that scores 1, as far as the judge is right.
        max_tokens: Maximum number of tokens and patches of the answer.
        details: Additional data for the measures.
    """

    kind: Literal["transcribe", "speak", "chat", "continue"]
    parts: tuple[Part, ...]
    answers_with: Literal["text", "sound"]
    reference: Answer
    max_tokens: int = 256
    details: Any = None


class OpenTask(Protocol):
    """A task with its options, ready to give examples."""

    @property
    def judge(self) -> str:
        """What decides about an answer, for reports."""

    @property
    def chance(self) -> float | None:
        """The expected score without understanding; None if it is measured with the references of other examples."""

    @property
    def num_examples(self) -> int | None:
        """Number of examples of a finite task; None for an infinite task."""

    def example(self, index: int) -> AudioExample:
        """Return example number `index`: a pure function of the options, the seed and the index."""

    def measures(self, example: AudioExample, answer: Answer) -> Measures:
        """Return the measures of an answer; "score" is among them and lies between 0 and 1. No answer raises."""


@dataclass(frozen=True)
class AudioTask:
    """An audio task.

    Attributes:
        version: Incremented when results are no longer comparable.
        options: A frozen dataclass of settings.
        open: `open(options, seed)` returns the task. Raises UserError for options that cannot be used.
    """

    version: int
    options: type
    open: Callable[[Any, int], OpenTask]


AUDIO_TASKS: Registry[AudioTask] = Registry("openmimo.evals.audio.tasks", AudioTask)
