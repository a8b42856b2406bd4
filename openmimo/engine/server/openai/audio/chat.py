"""Chat completions of models that hear and speak."""

import base64
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import Request, Response

from openmimo.engine.server.backends.speech import (
    ChatWork,
    Clip,
    Part,
    SpeechBackend,
    SpeechDelta,
    SpeechMessage,
    SpeechOutput,
    SpeechRequest,
    SpeechSampling,
    speech_request,
)
from openmimo.engine.server.chat.requests import derived_seed
from openmimo.engine.server.http.bodies import unless_disconnected
from openmimo.engine.server.http.errors import ApiError, invalid
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.http.streaming import DONE, event, respond
from openmimo.engine.server.http.warnings import warn
from openmimo.engine.server.openai.audio.clips import Clips, speech_backend
from openmimo.engine.server.openai.audio.requests import check_work, no_sound, speech_deltas
from openmimo.engine.server.openai.audio.sounds import PcmStream, check_format, check_voice, encoded, joined
from openmimo.engine.server.openai.audio.store import SpeechStore, new_reply_id
from openmimo.engine.server.openai.conversation import template_options
from openmimo.engine.server.openai.sampling import chat_token_limit
from openmimo.engine.server.openai.schema import AudioPart, ChatMessage, ChatRequest, voice_name

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What the sampler of text models does and that of speech models does not.
_TEXT_ONLY = (
    "tools", "logprobs", "top_logprobs", "prompt_logprobs", "structured_outputs", "stop", "stop_token_ids",
    "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "min_p", "min_tokens",
    "ignore_eos", "max_repeats", "continue_final_message", "return_token_ids", "session", "priority",
)  # fmt: skip


def field_with_audio(body: ChatRequest) -> str | None:
    """Return the first field that contains or asks for sound, or None if a text model can answer the request."""
    for index, message in enumerate(body.messages):
        if message.audio is not None:
            return f"messages[{index}].audio"
        for position, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, AudioPart):
                return f"messages[{index}].content[{position}]"
    if body.audio is not None:
        return "audio"
    return "modalities" if "audio" in (body.modalities or ()) else None


async def answer_chat(
    service: Service, store: SpeechStore, body: ChatRequest, request: Request, audio_field: str
) -> Response:
    """Answer a chat completion with sound, which `audio_field` contains or asks for. Raises ApiError."""
    backend = speech_backend(service, audio_field, audio_field)
    form = _reply_form(body)
    voice, warnings = check_voice(backend.model.voices, voice_name(body.audio.voice if body.audio else None), "voice")
    _check_options(body)
    clips = Clips(service, backend)

    def prepare() -> list[SpeechRequest]:
        messages = tuple(_spoken_message(message, index, clips, store) for index, message in enumerate(body.messages))
        requests = _requests(service, body, ChatWork(messages, form.output, thinks=_thinks(body), voice=voice))
        check_work(service, requests, "messages")
        return requests

    prepared = await unless_disconnected(request.receive, service.prepared(prepare, is_large=request.state.is_large))
    request.state.open_body.add(clips.num_bytes)
    answer = _SpokenChat(service, backend, store, body, form, prepared, service.start(prepared))
    response = await respond(request, answer, answer.events() if body.stream else None)
    return warn(response, [*warnings, *clips.notes])


@dataclass(frozen=True)
class _ReplyForm:
    """What a reply consists of.

    Attributes:
        output: Text, sound, or both.
        format: Format of the sound.
    """

    output: SpeechOutput
    format: str


def _reply_form(body: ChatRequest) -> _ReplyForm:
    modalities = set(body.modalities or ("text",))
    if (body.audio is not None) != ("audio" in modalities):
        raise invalid(
            'Sound needs both modalities: ["text", "audio"] and audio: {"voice": ..., "format": ...}.',
            "modalities" if body.audio is not None else "audio",
        )
    if body.audio is None:
        return _ReplyForm("text", "")
    if body.stream and body.audio.format != "pcm16":
        raise invalid("A stream has the format pcm16.", "audio.format")
    name = check_format(body.audio.format, "audio.format")
    return _ReplyForm("interleaved" if "text" in modalities else "audio", name)


def _check_options(body: ChatRequest) -> None:
    for name in _TEXT_ONLY:
        if getattr(body, name):
            raise invalid(
                f"{name} is not supported in chats with sound.",
                name,
                code="unsupported_parameter",
            )
    if body.response_format is not None and body.response_format.type != "text":
        raise invalid(
            f"response_format {body.response_format.type} is not supported in chats with sound.",
            "response_format",
            code="unsupported_parameter",
        )


def _thinks(body: ChatRequest) -> bool:
    return template_options(body.chat_template_kwargs, body.reasoning_effort, "reasoning_effort").thinks


def _requests(service: Service, body: ChatRequest, work: ChatWork) -> list[SpeechRequest]:
    num_choices = body.n or 1
    service.check_num_replies(1, num_choices)
    return [
        speech_request(
            work,
            SpeechSampling(
                chat_token_limit(body, service.config.max_tokens),
                text_temperature=body.temperature,
                top_p=body.top_p,
                seed=derived_seed(body.seed, choice),
            ),
        )
        for choice in range(num_choices)
    ]


def _spoken_message(message: ChatMessage, index: int, clips: Clips, store: SpeechStore) -> SpeechMessage:
    """Convert a turn. The content of a turn whose sound has expired takes its place."""
    where = f"messages[{index}]"
    if message.role not in _ROLES or message.tool_calls:
        raise invalid("Calls of tools are not supported in chats with sound.", f"{where}.role")
    parts: list[Part] = []
    if message.audio is not None:
        reply = store.get(message.audio.id)
        if reply is not None:
            return SpeechMessage("assistant", (reply.transcript, reply.clip) if reply.transcript else (reply.clip,))
        if not message.content:
            raise _no_reply(message.audio.id, f"{where}.audio.id")
        clips.notes.append(f"{where}.audio has expired, its content is used")
    if isinstance(message.content, str):
        parts.append(message.content)
    for position, part in enumerate(message.content if isinstance(message.content, list) else ()):
        if not isinstance(part, AudioPart):
            parts.append(part.text)
        elif message.role != "user":
            raise invalid("Only the user sends recordings.", f"{where}.content[{position}]")
        else:
            parts.append(clips.from_base64(part.input_audio.data, f"{where}.content[{position}].input_audio.data"))
    return SpeechMessage(_ROLES[message.role], tuple(part for part in parts if isinstance(part, Clip) or part))


def _no_reply(reply_id: str, param: str) -> ApiError:
    return ApiError(
        404,
        f"There is no sound with the id {reply_id!r}, or it has expired; send the transcript as content.",
        param=param,
        code="audio_not_found",
    )


@dataclass
class _SpokenReply:
    """One choice, built from its deltas.

    Attributes:
        audio_id: Id of the sound.
        reasoning: The thoughts.
        content: The text, or the transcript of the sound.
        pieces: The sound.
        finish_reason: Empty while the reply is unfinished.
        num_tokens: Generated tokens of text and patches of sound.
        num_patches: Patches among them.
        num_reasoning_tokens: Tokens among them that are thoughts.
    """

    audio_id: str = field(default_factory=new_reply_id)
    reasoning: str = ""
    content: str = ""
    pieces: list[np.ndarray] = field(default_factory=list)
    finish_reason: str = ""
    num_tokens: int = 0
    num_patches: int = 0
    num_reasoning_tokens: int = 0

    def push(self, delta: SpeechDelta) -> None:
        """Add a delta."""
        self.reasoning += delta.reasoning
        self.content += delta.text
        self.finish_reason = delta.finish_reason
        self.num_tokens += delta.num_tokens
        self.num_patches += delta.num_patches
        self.num_reasoning_tokens += delta.num_tokens if delta.reasoning else 0
        if delta.waveform is not None:
            self.pieces.append(delta.waveform)


class _SpokenChat:
    """The replies to one chat request, as one object or as a stream of chunks."""

    def __init__(
        self,
        service: Service,
        backend: SpeechBackend,
        store: SpeechStore,
        body: ChatRequest,
        form: _ReplyForm,
        requests: Sequence[SpeechRequest],
        generation: Generation,
    ):
        self.generation = generation
        self._model = backend.model
        self._store = store
        self._body = body
        self._form = form
        self._counts = backend.model.prompt_counts(requests[0].work)
        self._replies = [_SpokenReply() for _ in requests]
        self._envelope = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the chat completion."""
        async for index, delta in speech_deltas(self.generation):
            self._replies[index].push(delta)
        choices = [
            {
                "index": index,
                "message": self._message(reply),
                "logprobs": None,
                "finish_reason": reply.finish_reason,
            }
            for index, reply in enumerate(self._replies)
        ]
        return {**self._envelope, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def _message(self, reply: _SpokenReply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        _check_output(reply, self._form)
        if reply.pieces:
            waveform = joined(reply.pieces)
            sound = encoded(waveform, self._model.sample_rate, self._form.format, "audio.format")
            message["content"] = None
            message["audio"] = {
                "id": reply.audio_id,
                "data": base64.b64encode(sound).decode(),
                "transcript": reply.content,
                "expires_at": self._keep(reply),
            }
        return message

    def _keep(self, reply: _SpokenReply) -> int:
        """Store the sound of a reply. Returns its expiry."""
        self._store.put(reply.audio_id, Clip(joined(reply.pieces), self._model.sample_rate), reply.content)
        return self._store.expiry()

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the chunks. Those of a spoken reply have the sound, its transcript, and at the end its expiry."""
        streams = [PcmStream(self._model.sample_rate) for _ in self._replies]
        speaks = self._form.output != "text"
        for index, reply in enumerate(self._replies):
            first: dict[str, Any] = {"role": "assistant", "content": None if speaks else ""}
            yield self._chunk(index, first | ({"audio": {"id": reply.audio_id, "transcript": ""}} if speaks else {}))
        async for index, delta in speech_deltas(self.generation):
            reply, stream = self._replies[index], streams[index]
            reply.push(delta)
            sound = b"" if delta.waveform is None else stream.push(delta.waveform)
            if reply.finish_reason and speaks:
                sound += stream.finish()
            if chunk := _delta(delta, sound, reply.audio_id if speaks else None):
                yield self._chunk(index, chunk)
            if reply.finish_reason:
                _check_output(reply, self._form)
                end = {"audio": {"id": reply.audio_id, "expires_at": self._keep(reply)}} if reply.pieces else {}
                yield self._chunk(index, end, reply.finish_reason)
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield event({**self._envelope, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        return event({**self._envelope, "object": "chat.completion.chunk", "choices": [choice]})

    def _usage(self) -> dict[str, Any]:
        num_text, num_audio = self._counts
        num_patches = sum(reply.num_patches for reply in self._replies)
        num_new = sum(reply.num_tokens for reply in self._replies)
        return {
            "prompt_tokens": num_text + num_audio,
            "completion_tokens": num_new,
            "total_tokens": num_text + num_audio + num_new,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": num_audio},
            "completion_tokens_details": {
                "reasoning_tokens": sum(reply.num_reasoning_tokens for reply in self._replies),
                "audio_tokens": num_patches,
            },
        }


def _check_output(reply: _SpokenReply, form: _ReplyForm) -> None:
    """Raise ApiError if a spoken reply has neither sound nor text. One without sound has its text as content."""
    if form.output != "text" and not (reply.pieces or reply.content or reply.reasoning):
        raise no_sound()


def _delta(part: SpeechDelta, sound: bytes, audio_id: str | None) -> dict[str, Any]:
    """The delta object of a chunk. The text of a spoken reply is the transcript of its sound."""
    delta: dict[str, Any] = {"reasoning_content": part.reasoning} if part.reasoning else {}
    if audio_id is None:
        return delta | ({"content": part.text} if part.text else {})
    audio: dict[str, Any] = {"transcript": part.text} if part.text else {}
    if sound:
        audio["data"] = base64.b64encode(sound).decode()
    return delta | ({"audio": {"id": audio_id, **audio}} if audio else {})
