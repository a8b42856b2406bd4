"""POST /v1/audio/speech: the sound of a text."""

import base64
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import Response as RawResponse

from openmimo.engine.server.backends.speech import SpeakWork, SpeechBackend, SpeechDelta, SpeechSampling, speech_request
from openmimo.engine.server.http.bodies import JsonRoute, unless_disconnected
from openmimo.engine.server.http.errors import invalid
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.http.streaming import EventStream, event
from openmimo.engine.server.http.warnings import warn
from openmimo.engine.server.openai.audio.clips import speech_backend
from openmimo.engine.server.openai.audio.requests import check_work
from openmimo.engine.server.openai.audio.schema import SpeechFields
from openmimo.engine.server.openai.audio.sounds import MEDIA_TYPES, check_format, check_voice, sound_stream
from openmimo.engine.server.openai.schema import VoiceId

_SPOKEN: dict[int | str, dict[str, Any]] = {
    200: {"description": "The sound, or its events.", "content": {"audio/*": {}, "text/event-stream": {}}}
}


def speech_routes(service: Service) -> APIRouter:
    """The endpoint /v1/audio/speech of a service."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/audio/speech", responses=_SPOKEN)
    async def speech(body: SpeechFields, request: Request) -> Response:
        """Speaks a text. Sound is sent as it is generated, in the formats that can be."""
        service.check_model(body.model)
        backend = speech_backend(service, "Speech")
        if body.speed not in (None, 1.0):
            raise invalid(
                "speed is not supported: resampling would change the pitch of the voice. Say how fast to speak in "
                "instructions.",
                "speed",
            )
        name = check_format(body.response_format, "response_format")
        voice, warnings = check_voice(backend.model.voices, _voice_name(body), "voice")
        sampling = SpeechSampling(service.config.max_tokens, audio_temperature=body.temperature, seed=body.seed)
        one = speech_request(SpeakWork(body.input, body.instructions or None, voice), sampling)
        work = service.prepared(lambda: check_work(service, [one], "input"), is_large=False)
        await unless_disconnected(request.receive, work)
        answer = _SpeechAnswer(backend, service.start([one]), name)
        if body.stream_format == "sse":
            return warn(EventStream(answer.events(one, backend), answer.generation), warnings)
        return warn(await answer.sound(request), warnings)

    return router


def _voice_name(body: SpeechFields) -> str | None:
    return body.voice.id if isinstance(body.voice, VoiceId) else body.voice


class _SpeechAnswer:
    """The sound of one text, in pieces."""

    def __init__(self, backend: SpeechBackend, generation: Generation, name: str):
        self.generation = generation
        self._stream = sound_stream(backend.model.sample_rate, name)
        self._name = name
        self._num_patches = 0

    async def sound(self, request: Request) -> Response:
        """Wait for the first bytes, so that a failure before them has its own status, and send the rest as it comes."""
        pieces = self._pieces()
        try:
            first = await unless_disconnected(request.receive, anext(pieces))
        except BaseException:  # includes cancellation: the reply must not run on without its reader
            await self.generation.close()
            raise
        return _SoundStream(first, pieces, self.generation, MEDIA_TYPES[self._name])

    async def events(self, request: Any, backend: SpeechBackend) -> AsyncIterator[bytes]:
        """Yield the events of OpenAI's API."""
        async for piece in self._pieces():
            yield event({"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()})
        num_text, num_audio = backend.model.prompt_counts(request.work)
        usage = {
            "input_tokens": num_text + num_audio,
            "output_tokens": self._num_patches,
            "total_tokens": num_text + num_audio + self._num_patches,
        }
        yield event({"type": "speech.audio.done", "usage": usage})

    async def _pieces(self) -> AsyncIterator[bytes]:
        """Yield the bytes of the reply, at least once."""
        async for _, delta in self.generation.deltas():
            if isinstance(delta, SpeechDelta) and delta.waveform is not None:
                self._num_patches += delta.num_tokens
                if piece := self._stream.push(delta.waveform):
                    yield piece
        yield self._stream.finish()


class _SoundStream(RawResponse):
    """Send pieces of sound as they come, and close `generation` when they end or the client disconnects."""
