"""The audio engine as the model that answers audio tasks."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from openmimo.data.audio.files import SAMPLE_RATE, resample
from openmimo.engine.audio.engine import AudioEngine, AudioEvent, AudioParams
from openmimo.evals.audio.task import Answer, AudioExample, Sound
from openmimo.model.audio.sequence import AudioPart, TextPart
from openmimo.model.audio.sequence import Part as PromptPart

_SOUND_START = "<|sosp|>"


class AudioAnswerer(Protocol):
    """A model that answers audio examples."""

    def answer(self, example: AudioExample, seed: int) -> Answer:
        """Return the answer. Raises UserError if the model fails."""


class LocalAudioModel:
    """The audio engine in this process. Text is decoded greedily, sound is drawn with the seed."""

    def __init__(self, engine: AudioEngine):
        self._engine = engine

    def answer(self, example: AudioExample, seed: int) -> Answer:
        """As `AudioAnswerer.answer`."""
        sounds = [part for part in example.parts if isinstance(part, Sound)]
        texts = [part for part in example.parts if isinstance(part, str)]
        output = "text" if example.answers_with == "text" else "audio"
        params = AudioParams(output=output, max_tokens=example.max_tokens, seed=seed)  # type: ignore[arg-type]
        match example.kind:
            case "transcribe":
                waveform = self._samples(sounds[0])
                return Answer(self._engine.transcribe(waveform, self._engine.sample_rate, max_tokens=params.max_tokens))
            case "speak":
                voice = self._samples(sounds[0]) if sounds else None
                return self._answer(
                    AudioEvent(waveform=piece) for piece in self._engine.speak(texts[0], voice=voice, params=params)
                )
            case "chat":
                content = [self._item(part) for part in example.parts]
                return self._answer(self._engine.generate([{"role": "user", "content": content}], params))
            case "continue":
                return self._answer(self._engine.generate(self._continued(sounds), params))

    def _continued(self, sounds: list[Sound]) -> list[PromptPart]:
        parts: list[PromptPart] = [AudioPart(self._engine.codes_of(self._samples(sound))) for sound in sounds]
        return [*parts, TextPart(_SOUND_START, is_markup=True)]

    def _item(self, part: str | Sound) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "audio", "audio": self._samples(part)}

    def _samples(self, sound: Sound) -> np.ndarray:
        return resample(sound.waveform, SAMPLE_RATE, self._engine.sample_rate)

    def _answer(self, events: Iterator[AudioEvent]) -> Answer:
        text, pieces = "", []
        for event in events:
            text += event.text or ""
            if event.waveform is not None:
                pieces.append(event.waveform)
        waveform = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
        return Answer(text, Sound(resample(waveform, self._engine.sample_rate, SAMPLE_RATE)))
