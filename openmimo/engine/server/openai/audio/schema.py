"""Request schemas of the endpoints under /v1/audio."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from openmimo.engine.server.http import limits
from openmimo.engine.server.http.fields import Fields, Name
from openmimo.engine.server.openai.schema import Voice


class SpeechFields(Fields):
    """POST /v1/audio/speech.

    Attributes:
        seed: Determines the sound (not in OpenAI's API).
        temperature: Of the sampling of sound (not in OpenAI's API).
    """

    input: Annotated[str, Field(min_length=1, max_length=limits.SPOKEN_CHARACTERS)]
    model: Name | None = None
    voice: Voice | None = None
    instructions: Annotated[str, Field(max_length=limits.SPOKEN_CHARACTERS)] | None = None
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: Annotated[float, Field(ge=0.25, le=4.0)] | None = None
    stream_format: Literal["audio", "sse"] = "audio"
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None


class TranscriptionFields(BaseModel):
    """The fields of the form of POST /v1/audio/transcriptions, except the file. All arrive as texts.

    Attributes:
        language: Language of the recording, which verbose_json repeats. The model is given no language.
        seed: Determines the sampled text (not in OpenAI's API).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: Name | None = None
    language: Name | None = None
    prompt: str | None = None
    response_format: Name = "json"
    stream: bool = False
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    timestamp_granularities: list[Name] = []
    include: list[Name] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
