"""The openai package: chats, streams, tools, forms, thinking, log-probabilities, responses, embeddings."""

import base64
import io
import json
import struct
import wave
from datetime import date
from typing import Literal
from uuid import UUID

from checks import KEY, MODEL, Served, check, main
from openai import OpenAI
from pydantic import BaseModel, Field

HELLO = [{"role": "user", "content": "hello"}]
SHORT = {"model": MODEL, "max_tokens": 12}


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Literal[7, 9]


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Pets(BaseModel):
    pet: Cat | Dog
    counts: dict[Literal["a", "b"], Literal[1, 2]]


class Visits(BaseModel):
    by_id: dict[UUID, Literal[1, 2]]
    colors: set[Literal["red", "green"]]
    dates: dict[date, bool] = Field(max_length=2)


class Weather(BaseModel):
    city: str
    degrees: int


class GetWeather(BaseModel):
    city: str


def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


@check("openai models, request ids")
def _(served: Served) -> None:
    models = client(served.url).models.list()
    assert MODEL in [model.id for model in models] and models._request_id


@check("openai chat, streamed and whole")
def _(served: Served) -> None:
    ask = {**SHORT, "messages": HELLO, "temperature": 0}
    whole = client(served.url).chat.completions.create(**ask).choices[0].message.content
    options = {"include_usage": True}
    *chunks, last = client(served.url).chat.completions.create(**ask, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert last.usage.completion_tokens == 12


@check("openai fields of new models")
def _(served: Served) -> None:
    reply = client(served.url).chat.completions.create(
        **SHORT, messages=HELLO, verbosity="low", reasoning_effort="none", prompt_cache_key="k", store=False
    )
    assert reply.choices[0].message.role == "assistant"


@check("openai parse of a pydantic form")
def _(served: Served) -> None:
    reply = client(served.url).chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Pets, max_tokens=900, temperature=0.2, seed=1
    )
    assert isinstance(reply.choices[0].message.parsed, Pets)


@check("openai parse of a pydantic form with keys of a format and a set")
def _(served: Served) -> None:
    reply = client(served.url).chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Visits, max_tokens=3000, temperature=0.2, seed=1
    )
    content = json.loads(reply.choices[0].message.content)
    assert isinstance(reply.choices[0].message.parsed, Visits)
    assert len(content["colors"]) == len(set(content["colors"]))


@check("openai tools with a form")
def _(served: Served) -> None:
    import openai

    messages = list(HELLO)
    ask = {"model": MODEL, "tools": [openai.pydantic_function_tool(GetWeather)], "response_format": Weather}
    message = client(served.scripted_url).chat.completions.parse(messages=messages, **ask).choices[0].message
    assert message.tool_calls[0].function.parsed_arguments == GetWeather(city="Oslo")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "4"}
    messages = [*HELLO, message.model_dump(exclude_none=True), result]
    message = client(served.scripted_url).chat.completions.parse(messages=messages, **ask).choices[0].message
    assert message.parsed == Weather(city="Oslo", degrees=4)


@check("openai logprobs")
def _(served: Served) -> None:
    reply = client(served.url).chat.completions.create(**SHORT, messages=HELLO, logprobs=True, top_logprobs=3)
    assert all(len(entry.top_logprobs) == 3 for entry in reply.choices[0].logprobs.content)
    columns = client(served.url).completions.create(**SHORT, prompt="x", echo=True, logprobs=2).choices[0].logprobs
    assert all(token in top for token, top in list(zip(columns.tokens, columns.top_logprobs, strict=True))[1:])


@check("openai responses, streamed and whole")
def _(served: Served) -> None:
    ask = {"model": MODEL, "input": "hello", "max_output_tokens": 12, "temperature": 0}
    whole = client(served.url).responses.create(**ask).output_text
    with client(served.url).responses.stream(**ask) as stream:
        for event in stream:
            last = event
    assert last.response.output_text == whole


@check("openai responses, logprobs")
def _(served: Served) -> None:
    reply = client(served.url).responses.create(
        model=MODEL, input="hello", max_output_tokens=12, include=["message.output_text.logprobs"], top_logprobs=3
    )
    assert all(len(entry.top_logprobs) == 3 for entry in reply.output[0].content[0].logprobs)


@check("openai responses parse of a pydantic form")
def _(served: Served) -> None:
    reply = client(served.url).responses.parse(
        model=MODEL, input="hello", text_format=Pets, max_output_tokens=900, temperature=0.2
    )
    assert isinstance(reply.output_parsed, Pets)


@check("openai embeddings")
def _(served: Served) -> None:
    data = client(served.url).embeddings.create(model=MODEL, input=["a b", "c"]).data
    assert [len(entry.embedding) for entry in data] == [len(data[0].embedding)] * 2


def recording(seconds: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(b"".join(struct.pack("<h", (step % 80 - 40) * 400) for step in range(16_000 * seconds)))
    return file.getvalue()


@check("openai transcriptions, whole and streamed")
def _(served: Served) -> None:
    ask = {"model": MODEL, "file": ("speech.wav", recording()), "extra_body": {"seed": 1}}
    whole = client(served.audio_url).audio.transcriptions.create(**ask).text
    *deltas, done = client(served.audio_url).audio.transcriptions.create(**ask, stream=True)
    assert "".join(event.delta for event in deltas) == done.text == whole
    verbose = client(served.audio_url).audio.transcriptions.create(**ask, response_format="verbose_json")
    assert verbose.duration == 1.0


@check("openai speech, whole and streamed")
def _(served: Served) -> None:
    text = "hello world, what a fine day it is. " * 3
    ask = {"model": MODEL, "voice": "alloy", "input": text, "extra_body": {"seed": 1}}
    pcm = client(served.audio_url).audio.speech.create(**ask, response_format="pcm").content
    with client(served.audio_url).audio.speech.with_streaming_response.create(**ask, response_format="pcm") as reply:
        assert b"".join(reply.iter_bytes()) == pcm
    sound = client(served.audio_url).audio.speech.create(**ask, response_format="wav").content
    assert sound.startswith(b"RIFF") and len(sound) == 44 + len(pcm)


@check("openai chat with sound in and out")
def _(served: Served) -> None:
    data = base64.b64encode(recording()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    text = {"type": "text", "text": "hello"}
    ask = {"model": MODEL, "messages": [{"role": "user", "content": [text, part]}], "max_tokens": 24, "seed": 1}
    heard = client(served.audio_url).chat.completions.create(**ask)
    assert heard.usage.prompt_tokens_details.audio_tokens == 7
    speak = {"modalities": ["text", "audio"], "temperature": 1.0}
    audio = (
        client(served.audio_url)
        .chat.completions.create(**ask, **speak, audio={"voice": "alloy", "format": "wav"})
        .choices[0]
        .message.audio
    )
    assert audio.id and audio.expires_at
    transcript, pieces = "", b""
    for chunk in client(served.audio_url).chat.completions.create(
        **ask, **speak, audio={"voice": "alloy", "format": "pcm16"}, stream=True
    ):
        delta = chunk.choices[0].delta.audio
        if delta is not None:
            transcript += delta.transcript or ""
            pieces += base64.b64decode(delta.data or "")
    assert transcript == audio.transcript and base64.b64decode(audio.data)[44:] == pieces


main("openai")
