"""The audio engine as a speech model of the server."""

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from openmimo.core.errors import UserError
from openmimo.data.audio.corpus import TRANSCRIBE
from openmimo.data.audio.files import read_audio
from openmimo.engine.audio.engine import AudioEngine, AudioEvent, AudioParams, positions_of_speech, voice_turn
from openmimo.engine.server.backends.speech import (
    ChatWork,
    Clip,
    SpeakWork,
    SpeechEvent,
    SpeechMessage,
    SpeechSampling,
    SpeechWork,
    TranscribeWork,
    seconds_of,
)

_VOICES = "voices"
_VOICE_SECONDS = 60.0


class AudioModel:
    """Generates replies with an audio engine.

    Tokens and patches of a prompt are counted from its texts and the length of its sound.

    Args:
        engine: The engine. Only one thread may use what `events` returns.
        voices: Recordings at the engine's sample rate, by the name of the voice.
    """

    def __init__(self, engine: AudioEngine, voices: Mapping[str, np.ndarray]):
        self.sample_rate = engine.sample_rate
        self.voices = tuple(voices)
        self._engine = engine
        self._recordings = voices
        self._max_positions = engine.model.config.max_positions
        frames = engine.model.audio.patch_frames
        self._patch_samples = frames * engine.sample_rate / engine.codec.config.frames_per_second

    def check(self, work: SpeechWork) -> None:
        """Raise UserError if prompt and given text have more positions than the model, or there is no text to speak."""
        if isinstance(work, SpeakWork) and not work.text.strip():
            raise UserError("there is no text to speak.")
        num_positions = sum(self.prompt_counts(work))
        if isinstance(work, SpeakWork):
            num_positions += positions_of_speech(self._engine.builder.speech_segments(work.text))
        if num_positions >= self._max_positions:
            raise UserError(
                f"the request needs about {num_positions} positions, but the model has {self._max_positions} for "
                "prompt and reply. Give shorter audio or text."
            )

    def prompt_counts(self, work: SpeechWork) -> tuple[int, int]:
        """As `SpeechModel.prompt_counts`."""
        voice = self._voice(work)
        num_samples = seconds_of(work) * self.sample_rate + (0 if voice is None else len(voice))
        num_patches = math.ceil(num_samples / self._patch_samples)
        return len(self._engine.tokenizer.encode(_text_of(work))), num_patches

    def events(self, work: SpeechWork, sampling: SpeechSampling) -> Iterator[SpeechEvent]:
        """As `SpeechModel.events`."""
        match work:
            case TranscribeWork():
                yield from self._transcription(work.clip, _params(sampling))
            case SpeakWork():
                params = replace(_params(sampling), output="audio")
                for event in self._engine.speech(work.text, work.instruction, self._voice(work), params=params):
                    yield _speech_event(event)
            case ChatWork():
                params = replace(_params(sampling), output=work.output, thinking=work.thinks)
                for event in self._engine.chat(self._conversation(work), params):
                    yield _speech_event(event)

    def _voice(self, work: SpeechWork) -> np.ndarray | None:
        name = None if isinstance(work, TranscribeWork) else work.voice
        return None if name is None else self._recordings[name]

    def _conversation(self, work: ChatWork) -> list[dict[str, Any]]:
        """The messages after the recording of the voice, if the work names one."""
        voice = self._voice(work)
        messages = [_message(message) for message in work.messages]
        return messages if voice is None else [voice_turn(voice), *messages]

    def _transcription(self, clip: Clip, params: AudioParams) -> Iterator[SpeechEvent]:
        """The text of a clip, without space at its beginning."""
        begins = True
        for event in self._engine.transcription(clip.waveform, clip.sample_rate, params):
            text = event.text or ""
            text = text.lstrip() if begins else text
            begins = begins and not text
            yield _speech_event(replace(event, text=text))


def read_voices(folder: Path, sample_rate: int) -> dict[str, np.ndarray]:
    """Return the voices of a model: recordings in its folder `voices`, by their names without endings.

    Raises:
        UserError: A file is not a recording of at most a minute.
    """
    files = sorted(path for path in (folder / _VOICES).glob("*") if path.is_file())
    return {
        path.stem: read_audio(path, sample_rate=sample_rate, max_seconds=_VOICE_SECONDS).samples_S for path in files
    }


def _speech_event(event: AudioEvent) -> SpeechEvent:
    return SpeechEvent(
        event.text or "",
        event.reasoning or "",
        event.waveform,
        event.finish_reason or "",
        num_tokens=event.num_tokens,
        num_patches=event.num_patches,
    )


def _params(sampling: SpeechSampling) -> AudioParams:
    given = {
        "text_temperature": sampling.text_temperature,
        "audio_temperature": sampling.audio_temperature,
        "top_p": sampling.top_p,
        "seed": secrets.randbits(63) if sampling.seed is None else sampling.seed,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(AudioParams(max_tokens=sampling.max_tokens), **chosen)


def _message(message: SpeechMessage) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Clip):
            audio = {"waveform": part.waveform, "sample_rate": part.sample_rate}
            content.append({"type": "audio", "audio": audio})
        else:
            content.append({"type": "text", "text": part})
    return {"role": message.role, "content": content}


def _text_of(work: SpeechWork) -> str:
    match work:
        case TranscribeWork():
            return TRANSCRIBE
        case SpeakWork():
            return work.text + (work.instruction or "")
        case ChatWork():
            parts = [part for message in work.messages for part in message.parts]
            return "".join(part for part in parts if isinstance(part, str))
