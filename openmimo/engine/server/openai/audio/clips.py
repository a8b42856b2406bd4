"""Recordings of requests as clips, with bounded size, length and time. Runs in a worker thread."""

import base64
import binascii

from openmimo.core.errors import DataError
from openmimo.data.audio.files import read_audio
from openmimo.engine.server.backends.speech import Clip, SpeechBackend
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.errors import ApiError, invalid
from openmimo.engine.server.http.service import Service


def speech_backend(service: Service, wanted: str, param: str | None = None) -> SpeechBackend:
    """Return the backend of a model that hears and speaks.

    Args:
        service: The service.
        wanted: What the request asks for, as the subject of a sentence.
        param: Field of the request that asks for it.

    Raises:
        ApiError: The served model knows only text.
    """
    if service.speech is None:
        raise invalid(
            f"{wanted} is not supported: {service.model_name} reads and writes text only. Serve a MiMo-Audio model.",
            param,
            code="unsupported_modality",
        )
    return service.speech


class Clips:
    """The recordings of one request, decoded to the model's sample rate.

    Attributes:
        notes: What the conversions mean for the listener, for the warnings of the response.
        num_bytes: Size of the decoded sound.
    """

    def __init__(self, service: Service, backend: SpeechBackend):
        self._sample_rate = backend.model.sample_rate
        self._seconds_left = service.config.max_audio_seconds
        self._most_seconds = service.config.max_audio_seconds
        self._num_left = limits.CLIPS
        self.notes: list[str] = []
        self.num_bytes = 0

    def from_base64(self, data: str, param: str) -> Clip:
        """Decode a file in base64. Raises ApiError."""
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(f"{param} is not base64: {error}", param, code="invalid_audio") from error
        return self.from_file(content, param)

    def from_file(self, content: bytes, param: str) -> Clip:
        """Decode a file.

        Raises:
            ApiError: It is no audio file, is empty, has values that are not finite, or the recordings of the request
                are too many or too long.
        """
        if not self._num_left:
            raise invalid(f"The request has more than {limits.CLIPS} recordings.", param, code="invalid_audio")
        if not content:
            raise invalid(f"{param} is an empty file.", param, code="invalid_audio")
        self._num_left -= 1
        try:
            recording = read_audio(content, sample_rate=self._sample_rate, max_seconds=self._seconds_left, name=param)
        except DataError as error:
            raise self._refused(error, param) from error
        self._seconds_left -= recording.seconds
        self.num_bytes += recording.samples_S.nbytes
        if recording.note:
            self.notes.append(f"{param}: {recording.note}")
        return Clip(recording.samples_S, recording.sample_rate)

    def _refused(self, error: DataError, param: str) -> ApiError:
        return invalid(
            f"{error} The recordings of one request have at most {self._most_seconds:g} seconds in all.",
            param,
            code="invalid_audio",
        )
