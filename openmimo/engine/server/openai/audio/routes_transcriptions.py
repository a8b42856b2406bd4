"""POST /v1/audio/transcriptions and /v1/audio/translations: the text of a recording, sent as a form."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from openmimo.engine.server.backends.speech import Clip, SpeechSampling, TranscribeWork, speech_request
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.bodies import unless_disconnected
from openmimo.engine.server.http.errors import invalid, validation_error
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.http.streaming import STREAMED, event, respond
from openmimo.engine.server.http.warnings import warn
from openmimo.engine.server.openai.audio.clips import Clips, speech_backend
from openmimo.engine.server.openai.audio.requests import check_work, speech_deltas
from openmimo.engine.server.openai.audio.schema import TranscriptionFields

_LISTS = ("timestamp_granularities", "include")
_WITHOUT_EFFECT = ("prompt", "language")
_TIMED = ("srt", "vtt", "diarized_json")
_FORMATS = ("json", "text", "verbose_json")


def transcription_routes(service: Service) -> APIRouter:
    """The endpoints /v1/audio/transcriptions and /v1/audio/translations of a service."""
    router = APIRouter()

    @router.post("/v1/audio/transcriptions", responses=STREAMED, openapi_extra=_form_schema())
    async def transcriptions(request: Request) -> Response:
        """Writes down what is said in a recording."""
        backend = speech_backend(service, "Transcription")
        fields, content, warnings = await _read_form(service, request)
        service.check_model(fields.model)
        _check_options(fields)
        clips = Clips(service, backend)
        decoding = service.prepared(lambda: clips.from_file(content, "file"), is_large=True)
        clip = await unless_disconnected(request.receive, decoding)
        request.state.open_body.add(clips.num_bytes)
        sampling = SpeechSampling(service.config.max_tokens, text_temperature=fields.temperature, seed=fields.seed)
        one = speech_request(TranscribeWork(clip), sampling)
        check_work(service, [one], "file")
        answer = _Transcription(fields, clip, service.start([one]))
        response = await respond(request, answer, answer.events() if fields.stream else None)
        if fields.response_format == "text" and not fields.stream:
            response = PlainTextResponse(answer.text + "\n")
        return warn(response, [*warnings, *clips.notes, *answer.notes])

    @router.post("/v1/audio/translations", include_in_schema=False)
    async def translations(request: Request) -> Response:
        """Refuses to translate."""
        speech_backend(service, "Translation")
        raise invalid(
            "The model is not trained to translate recordings. Use /v1/audio/transcriptions, or ask for a translation "
            "in a chat with input_audio.",
            None,
            code="unsupported_endpoint",
        )

    return router


def _form_schema() -> dict[str, Any]:
    """The form in the OpenAPI schema, which cannot be read from the endpoint's parameters."""
    schema = TranscriptionFields.model_json_schema()
    schema["properties"]["file"] = {"type": "string", "format": "binary"}
    schema["required"] = ["file"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def _read_form(service: Service, request: Request) -> tuple[TranscriptionFields, bytes, list[str]]:
    """Return the fields, the content of the file, and warnings about what has no effect. Raises ApiError."""
    form = await _parsed_form(request)
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise invalid("file is missing; send the recording as a file of the form.", "file")
        content = await file.read()
        values, ignored = _values(form)
        if ignored and service.config.strict:
            raise invalid(f"{ignored[0]} is not a field that this server knows.", ignored[0], code="unknown_parameter")
        try:
            fields = TranscriptionFields.model_validate(values)
        except ValidationError as error:
            raise validation_error(error) from error
    finally:
        await form.close()
    service.metrics.count_ignored_fields(ignored)
    unused = [name for name in _WITHOUT_EFFECT if values.get(name) and not _is_repeated(name, fields)]
    warnings = [f"ignored fields: {', '.join([*ignored, *unused])}"] if ignored or unused else []
    return fields, content, warnings


def _is_repeated(name: str, fields: TranscriptionFields) -> bool:
    return name == "language" and fields.response_format == "verbose_json"


async def _parsed_form(request: Request) -> FormData:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise invalid("The body must be a form, sent as Content-Type: multipart/form-data.", None)
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=1,
        max_fields=limits.FORM_FIELDS,
        max_part_size=limits.FORM_FIELD_BYTES,
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise invalid(f"The form cannot be read: {error.message}", None, code="invalid_form") from error


def _values(form: FormData) -> tuple[dict[str, Any], list[str]]:
    """The fields of a form by name, without the file, and the names of unknown ones."""
    values: dict[str, Any] = {}
    ignored: dict[str, None] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if name == "file":
            continue
        if name not in TranscriptionFields.model_fields:
            ignored[key[: limits.PATH_CHARACTERS]] = None
        elif name in _LISTS:
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return values, list(ignored)


def _check_options(fields: TranscriptionFields) -> None:
    if fields.response_format in _TIMED:
        raise invalid(
            f"{fields.response_format} needs times or speakers, which the model does not give; use "
            f"{', '.join(_FORMATS)}.",
            "response_format",
        )
    if fields.response_format not in _FORMATS:
        raise invalid(f"response_format must be one of {', '.join(_FORMATS)}.", "response_format")
    if fields.timestamp_granularities:
        raise invalid("The model gives no times of words or segments.", "timestamp_granularities")
    if fields.include:
        raise invalid(f"{fields.include[0]} is not supported.", "include")


class _Transcription:
    """The text of one recording.

    Attributes:
        text: What was written so far.
        notes: Warnings about the text, known at its end.
    """

    def __init__(self, fields: TranscriptionFields, clip: Clip, generation: Generation):
        self.generation = generation
        self.text = ""
        self.notes: list[str] = []
        self._fields = fields
        self._seconds = clip.seconds

    async def whole(self) -> dict[str, Any]:
        """Return the transcription. verbose_json has the language that the request names, and no segments."""
        async for _ in self._pieces():
            pass
        answer: dict[str, Any] = {
            "text": self.text,
            "usage": {"type": "duration", "seconds": round(self._seconds, 3)},
        }
        if self._fields.response_format == "verbose_json":
            language = self._fields.language or "unknown"
            answer |= {"task": "transcribe", "language": language, "duration": self._seconds}
        return answer

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events of OpenAI's API."""
        async for piece in self._pieces():
            yield event({"type": "transcript.text.delta", "delta": piece})
        yield event({"type": "transcript.text.done", "text": self.text})

    async def _pieces(self) -> AsyncIterator[str]:
        async for _, delta in speech_deltas(self.generation):
            if delta.finish_reason == "length":
                self.notes.append("the text is cut off at the limit of tokens")
            if delta.text:
                self.text += delta.text
                yield delta.text
