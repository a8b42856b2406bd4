"""POST /v1/audio/speech: the sound of a text."""

import base64
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from openmimo.engine.server.backends.speech import (
    SpeakWork,
    SpeechBackend,
    SpeechRequest,
    SpeechSampling,
    speech_request,
)
from openmimo.engine.server.http.bodies import JsonRoute, unless_disconnected
from openmimo.engine.server.http.errors import engine_failed, invalid
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.http.streaming import EventStream, PieceStream, event
from openmimo.engine.server.http.warnings import warn
from openmimo.engine.server.openai.audio.clips import speech_backend
from openmimo.engine.server.openai.audio.requests import check_work, no_sound, speech_deltas
from openmimo.engine.server.openai.audio.schema import SpeechFields
from openmimo.engine.server.openai.audio.sounds import MEDIA_TYPES, check_format, check_voice, sound_stream
from openmimo.engine.server.openai.schema import voice_name

_SPOKEN: dict[int | str, dict[str, Any]] = {
    200: {"description": "The sound, or its events.", "content": {"audio/*": {}, "text/event-stream": {}}}
}


def speech_routes(service: Service) -> APIRouter:
    """The endpoint /v1/audio/speech of a service."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/audio/speech", responses=_SPOKEN)
    async def speech(body: SpeechFields, request: Request) -> Response:
        """Speaks a text. The sound is sent as it is generated, in the formats that allow it."""
        service.check_model(body.model)
        backend = speech_backend(service, "Speech")
        _check_speed(body.speed)
        name = check_format(body.response_format, "response_format")
        voice, warnings = check_voice(backend.model.voices, voice_name(body.voice), "voice")
        sampling = SpeechSampling(service.config.max_tokens, audio_temperature=body.temperature, seed=body.seed)
        one = speech_request(SpeakWork(body.input, body.instructions or None, voice), sampling)
        work = service.prepared(lambda: check_work(service, [one], "input"), is_large=False)
        await unless_disconnected(request.receive, work)
        answer = _SpeechAnswer(backend, one, service.start([one]), name)
        if body.stream_format == "sse":
            return warn(EventStream(answer.events(), answer.generation), warnings)
        return warn(await answer.sound(request), warnings)

    return router


def _check_speed(speed: float | None) -> None:
    if speed not in (None, 1.0):
        raise invalid(
            "speed is not supported: resampling would change the pitch of the voice. Say in instructions how fast to "
            "speak.",
            "speed",
        )


class _SpeechAnswer:
    """The sound of one text, in pieces."""

    def __init__(self, backend: SpeechBackend, request: SpeechRequest, generation: Generation, name: str):
        self.generation = generation
        self._backend = backend
        self._request = request
        self._stream = sound_stream(backend.model.sample_rate, name)
        self._name = name
        self._num_patches = 0

    async def sound(self, request: Request) -> Response:
        """Return the response once the first bytes exist, so that a failure before them has its own status."""
        pieces = self._pieces()
        try:
            first = await unless_disconnected(request.receive, _next(pieces))
        except BaseException:  # cancellation also: no reply runs without a reader
            await self.generation.close()
            raise
        headers = {"content-type": MEDIA_TYPES[self._name], "cache-control": "no-store"}
        return PieceStream(_after(first, pieces), self.generation, headers)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events of OpenAI's API."""
        async for piece in self._pieces():
            if piece:
                yield event({"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()})
        num_input = sum(self._backend.model.prompt_counts(self._request.work))
        usage = {
            "input_tokens": num_input,
            "output_tokens": self._num_patches,
            "total_tokens": num_input + self._num_patches,
        }
        yield event({"type": "speech.audio.done", "usage": usage})

    async def _pieces(self) -> AsyncIterator[bytes]:
        """Yield the bytes of the reply. The last piece may be empty. Raises ApiError for speech that is cut off."""
        has_sound = is_cut = False
        async for _, delta in speech_deltas(self.generation):
            is_cut = delta.finish_reason == "length"
            self._num_patches += delta.num_patches
            if delta.waveform is not None:
                has_sound = True
                if piece := self._stream.push(delta.waveform):
                    yield piece
        if not has_sound:
            raise no_sound()
        if is_cut:
            raise engine_failed("the speech did not end within the limit of tokens. Give a shorter text.")
        yield self._stream.finish()


async def _next(pieces: AsyncIterator[bytes]) -> bytes:
    return await anext(pieces)


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        if piece:
            yield piece
