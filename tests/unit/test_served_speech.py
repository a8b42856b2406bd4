"""Speech over HTTP: transcription, speech, and chats with sound, against the openai package's client and types."""

import base64
import io
import json
import threading

import numpy as np
import pytest
from fake_speech import PATCH, RATE, speech_backend, tone
from reply_types import check_type
from server_thread import connect, running, wait_until

from openmimo.engine.server.backends.speech import Clip
from openmimo.engine.server.backends.stub import StubBackend
from openmimo.engine.server.http import limits
from openmimo.engine.server.openai.audio.store import SpeechStore

soundfile = pytest.importorskip("soundfile", reason="needs the extra audio")
pytest.importorskip("soxr", reason="needs the extra audio")
pytest.importorskip("python_multipart", reason="needs the extra audio")


def file_of(waveform, sample_rate=RATE, kind="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, waveform, sample_rate, format=kind, subtype=subtype)
    return file.getvalue()


WAV = file_of(tone(0.5))


def part(content=WAV, kind="wav"):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": kind}}


def chat(*content, **fields):
    return {"messages": [{"role": "user", "content": list(content)}], **fields}


SPOKEN = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
TEXT = {"type": "text", "text": "say it"}


@pytest.fixture(scope="module")
def backend():
    return speech_backend()


@pytest.fixture(scope="module")
def server(backend):
    with running(backend, max_audio_seconds=60) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with connect(server) as client:
        yield client


@pytest.fixture(scope="module")
def openai_client(server):
    openai = pytest.importorskip("openai", reason="needs the openai client")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def events_of(text):
    return [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ") and line != "data: [DONE]"]


def transcribe(http, content=WAV, **fields):
    return http.post("/v1/audio/transcriptions", data=fields, files={"file": ("a.wav", content)} if content else None)


def refusal(response, status=400):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


# --- transcription ----------------------------------------------------------------------------------------------------


def test_transcriptions_with_the_openai_client(openai_client):
    types = pytest.importorskip("openai.types.audio")
    create = openai_client.audio.transcriptions.create
    ask = {"model": "speaker", "file": ("speech.wav", WAV)}
    assert create(**ask).text == "0.50 seconds at 16000"
    assert create(**ask, response_format="text") == "0.50 seconds at 16000\n"
    verbose = create(**ask, response_format="verbose_json", language="en")
    assert isinstance(verbose, types.TranscriptionVerbose)
    assert (verbose.duration, verbose.language, verbose.segments) == (0.5, "en", None)
    events = list(create(**ask, stream=True))
    assert [type(event) for event in events] == [types.TranscriptionTextDeltaEvent] * 4 + [
        types.TranscriptionTextDoneEvent
    ]
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == "0.50 seconds at 16000"


def test_transcriptions_have_the_types_of_the_api(http):
    types = pytest.importorskip("openai.types.audio")
    check_type(types.Transcription, transcribe(http).json())
    check_type(types.TranscriptionVerbose, transcribe(http, response_format="verbose_json").json())
    for event in events_of(transcribe(http, stream="true").text):
        check_type(types.TranscriptionStreamEvent, event)


@pytest.mark.parametrize(("kind", "subtype"), [("FLAC", None), ("MP3", None), ("OGG", "OPUS"), ("WAV", "FLOAT")])
def test_the_content_says_the_format(http, kind, subtype):
    text = transcribe(http, file_of(tone(0.5), kind=kind, subtype=subtype)).json()["text"]
    assert 0.45 < float(text.split()[0]) < 0.6


def test_other_rates_and_channels_are_converted_with_a_warning(http):
    response = transcribe(http, file_of(np.stack([tone(0.5, 8000)] * 2, axis=1), 8000))
    assert response.json()["text"] == "0.50 seconds at 16000"
    warning = response.headers["X-OpenMiMo-Warning"]
    assert "the mean of 2 channels" in warning and "8,000 Hz" in warning


BAD_FILES = {
    "empty": (b"", "empty file"),
    "not audio": (b"a text that is no sound" * 9, "cannot be read as audio"),
    "no samples": (file_of(tone(0)), "no samples"),
    "cut": (WAV[:30], "cannot be read as audio"),
    "nan": (file_of(np.array([0, np.nan, 0], "float32"), subtype="FLOAT"), "not a finite number"),
    "an hour": (file_of(np.zeros(3600 * RATE, "int16"), kind="FLAC"), "at most 60 seconds"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_recordings_are_refused_with_the_reason(http, name):
    content, reason = BAD_FILES[name]
    response = http.post("/v1/audio/transcriptions", files={"file": ("a.wav", content)})
    assert reason in refusal(response)
    assert response.json()["error"]["param"] == "file"
    if content:
        assert reason in refusal(http.post("/v1/chat/completions", json=chat(part(content))))


BAD_FIELDS = {
    "response_format": ({"response_format": "srt"}, "needs times"),
    "another format": ({"response_format": "xml"}, "one of json, text, verbose_json"),
    "timestamp_granularities": ({"timestamp_granularities[]": "word"}, "gives no times"),
    "include": ({"include[]": "logprobs"}, "logprobs is not supported"),
    "temperature": ({"temperature": "9"}, "temperature"),
    "stream": ({"stream": "maybe"}, "stream"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_fields_of_the_form_that_cannot_be_obeyed_are_refused(http, name):
    fields, reason = BAD_FIELDS[name]
    assert reason in refusal(transcribe(http, **fields))


def test_forms_that_are_none_are_refused(http):
    path = "/v1/audio/transcriptions"
    assert "multipart/form-data" in refusal(http.post(path, json={"file": "a"}))
    assert "file is missing" in refusal(http.post(path, data={"model": "speaker"}, files={"other": (None, "x")}))
    form = {"content-type": "multipart/form-data"}
    assert "form cannot be read" in refusal(http.post(path, content=b"x", headers=form))
    form = {"content-type": "multipart/form-data; boundary=b"}
    assert "form cannot be read" in refusal(http.post(path, content=b"--c\r\n\r\nx", headers=form))
    many = {f"field{index}": "x" for index in range(100)}
    assert "form cannot be read" in refusal(transcribe(http, **many))
    assert "form cannot be read" in refusal(http.post(path, files=[("file", b"x"), ("file", b"y")]))
    assert refusal(transcribe(http, model="other"), 404)


def test_fields_without_effect_are_named(http):
    response = transcribe(http, prompt="names", language="en", beams="4")
    assert response.headers["X-OpenMiMo-Warning"] == "ignored fields: beams, prompt, language"


def test_a_text_that_is_cut_off_has_a_warning(http):
    response = transcribe(http, file_of(tone(9)))
    assert response.headers["X-OpenMiMo-Warning"] == "the text is cut off at the limit of tokens"


def test_translations_are_refused(http):
    response = http.post("/v1/audio/translations", files={"file": ("a.wav", WAV)})
    assert "not trained to translate" in refusal(response)


# --- speech -----------------------------------------------------------------------------------------------------------


def test_speech_with_the_openai_client(openai_client):
    create = openai_client.audio.speech.create
    ask = {"model": "speaker", "voice": "alloy", "input": "one two three"}
    for name in ("wav", "flac", "mp3", "opus"):
        samples, rate = soundfile.read(io.BytesIO(create(**ask, response_format=name).content))
        assert len(samples) / rate == pytest.approx(3 * PATCH / RATE, abs=0.08), name
    pcm = np.frombuffer(create(**ask, response_format="pcm").content, "<i2")
    assert len(pcm) == pytest.approx(3 * PATCH / RATE * 24_000, abs=8)  # OpenAI's rate, not the model's
    assert np.abs(pcm).max() == pytest.approx(0.5 * 32767, rel=0.02)
    with openai_client.audio.speech.with_streaming_response.create(**ask, response_format="pcm") as response:
        assert b"".join(response.iter_bytes()) == pcm.tobytes()


def test_speech_arrives_while_it_is_generated(backend, http):
    body = {"input": "forever", "response_format": "wav"}
    with http.stream("POST", "/v1/audio/speech", json=body) as response:
        pieces = response.iter_raw()
        assert next(pieces).startswith(b"RIFF")
    wait_until(lambda: backend.model.open == 0)  # the client has left


def test_events_of_speech(http):
    body = {"input": "one two", "response_format": "pcm", "stream_format": "sse"}
    *deltas, done = events_of(http.post("/v1/audio/speech", json=body).text)
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    sound = b"".join(base64.b64decode(event["audio"]) for event in deltas)
    assert len(sound) == pytest.approx(2 * 2 * PATCH / RATE * 24_000, abs=16)
    usage = {"input_tokens": 2, "output_tokens": 2, "total_tokens": 4}
    assert done == {"type": "speech.audio.done", "usage": usage}


BAD_SPEECH = {
    "speed": ({"speed": 2.0}, "pitch"),
    "format": ({"response_format": "aac"}, "aac cannot be written here; give one of mp3"),
    "input": ({"input": ""}, "input"),
    "long input": ({"input": "x" * 5000}, "input"),
    "check": ({"input": "unspeakable"}, "cannot be spoken"),
    "failure": ({"input": "break"}, "the codec broke"),
}


@pytest.mark.parametrize("name", BAD_SPEECH)
def test_speech_that_is_refused(http, name):
    fields, reason = BAD_SPEECH[name]
    assert reason in refusal(http.post("/v1/audio/speech", json={"input": "one", **fields}))


def test_a_failure_after_the_first_sound_breaks_the_reply_off(http):
    import httpx

    for word, reason in (("break", "the codec broke"), ("cut", "did not end within the limit")):
        body = {"input": f"one {word}", "response_format": "wav"}
        with pytest.raises(httpx.RemoteProtocolError):
            http.post("/v1/audio/speech", json=body)
        events = events_of(http.post("/v1/audio/speech", json={**body, "stream_format": "sse"}).text)
        assert reason in events[-1]["error"]["message"]
    assert "within the limit" in refusal(http.post("/v1/audio/speech", json={"input": "one cut"}), 500)  # mp3


def test_speech_without_sound_is_an_error(http):
    for name in ("wav", "mp3"):
        response = http.post("/v1/audio/speech", json={"input": "silence", "response_format": name})
        assert "without sound" in refusal(response, 500)


def test_voices_are_those_of_the_model():
    with running(speech_backend(("ann", "ben"))) as server, connect(server) as http:
        assert http.get("/v1/models").json()["data"][0]["voices"] == ["ann", "ben"]
        for voice in ("ben", {"id": "ben"}):
            assert http.post("/v1/audio/speech", json={"input": "one", "voice": voice}).status_code == 200
        assert "ann, ben" in refusal(http.post("/v1/audio/speech", json={"input": "one", "voice": "alloy"}))


# --- chats ------------------------------------------------------------------------------------------------------------


def test_chats_with_the_openai_client(openai_client):
    types = pytest.importorskip("openai.types.chat")
    create = openai_client.chat.completions.create
    messages = [{"role": "user", "content": [TEXT, part()]}]
    heard = create(model="speaker", messages=messages)
    assert heard.choices[0].message.content == "say it and 0.50 seconds"
    assert heard.usage.prompt_tokens_details.audio_tokens == 5
    spoken = create(model="speaker", messages=messages, **SPOKEN).choices[0].message
    assert spoken.content is None and spoken.audio.transcript == "say it and 0.50 seconds"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(spoken.audio.data)))
    assert (len(samples), rate) == (5 * PATCH, RATE)
    stream = create(
        model="speaker",
        messages=messages,
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
        stream=True,
        stream_options={"include_usage": True},
    )
    audio = {"transcript": "", "data": b""}
    for chunk in stream:
        assert isinstance(chunk, types.ChatCompletionChunk)
        for choice in chunk.choices:
            if (delta := choice.delta.audio) is not None:
                audio["transcript"] += delta.transcript or ""
                audio["data"] += base64.b64decode(delta.data or "")
                audio |= {"id": delta.id, "expires_at": delta.expires_at}
        usage = chunk.usage
    assert audio["transcript"] == "say it and 0.50 seconds" and audio["id"] and audio["expires_at"] > 0
    assert len(audio["data"]) == pytest.approx(2 * 5 * PATCH * 24_000 / RATE, abs=16)
    assert usage.completion_tokens_details.audio_tokens == 5 and usage.completion_tokens == 10


def test_chats_have_the_types_of_the_api(http):
    types = pytest.importorskip("openai.types.chat")
    for body in (chat(part(), n=2), chat(TEXT, **SPOKEN), chat(part(), reasoning_effort="high")):
        check_type(types.ChatCompletion, http.post("/v1/chat/completions", json=body).json())
    streamed = SPOKEN | {"audio": {"format": "pcm16"}, "stream": True}
    for chunk in events_of(http.post("/v1/chat/completions", json=chat(TEXT, **streamed)).text):
        check_type(types.ChatCompletionChunk, chunk)


def test_thoughts_are_apart_from_what_is_said(http):
    body = chat(TEXT, reasoning_effort="high", **SPOKEN)
    message = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm."
    assert message["audio"]["transcript"] == "say it and 0.00 seconds"


def test_spoken_replies_without_sound_have_their_text_or_are_errors(http):
    mute = {"type": "text", "text": "mute"}
    choice = http.post("/v1/chat/completions", json=chat(mute, **SPOKEN)).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "no sound"}
    streamed = {"audio": {"format": "pcm16"}, "stream": True}
    chunks = events_of(http.post("/v1/chat/completions", json=chat(mute, **SPOKEN | streamed)).text)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and "audio" not in chunks[-1]["choices"][0]["delta"]
    alone = SPOKEN | {"modalities": ["audio"]}
    assert "without sound" in refusal(http.post("/v1/chat/completions", json=chat(mute, **alone)), 500)
    chunks = events_of(http.post("/v1/chat/completions", json=chat(mute, **alone | streamed)).text)
    assert "without sound" in chunks[-1]["error"]["message"]


def test_a_spoken_turn_is_referred_to_by_its_id(http):
    first = http.post("/v1/chat/completions", json=chat(TEXT, **SPOKEN)).json()["choices"][0]["message"]
    turns = [
        {"role": "user", "content": "say it"},
        {"role": "assistant", "audio": {"id": first["audio"]["id"]}},
        {"role": "user", "content": "again"},
    ]
    second = http.post("/v1/chat/completions", json={"messages": turns}).json()["choices"][0]["message"]
    assert second["content"] == "say it say it and 0.00 seconds again and 0.50 seconds"
    turns[1]["audio"]["id"] = "audio_0"
    assert "send the transcript" in refusal(http.post("/v1/chat/completions", json={"messages": turns}), 404)


def test_stored_sound_is_bounded_in_size_and_time():
    now = [1000.0]
    store = SpeechStore(max_bytes=3 * 400, seconds=60, clock=lambda: now[0])
    for index in range(4):
        store.put(str(index), Clip(np.zeros(100, "float32"), RATE), "said")
        now[0] += 10
    assert [store.get(str(index)) is not None for index in range(4)] == [False, True, True, True]
    now[0] += 35
    assert [store.get(str(index)) is not None for index in range(4)] == [False, False, True, True]


BAD_CHATS = {
    "no audio field": ({"modalities": ["text", "audio"]}, "both modalities"),
    "no modality": ({"audio": {"format": "wav"}}, "both modalities"),
    "streamed wav": ({**SPOKEN, "stream": True}, "format pcm16"),
    "aac": ({**SPOKEN, "audio": {"format": "aac"}}, "aac cannot be written"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported in chats with"),
    "logprobs": ({"logprobs": True}, "logprobs is not supported"),
    "form": ({"response_format": {"type": "json_object"}}, "json_object is not supported"),
    "base64": ({"messages": [{"role": "user", "content": [part() | {"input_audio": {"data": "%", "format": "wav"}}]}]},
               "is not base64"),
    "assistant": ({"messages": [{"role": "assistant", "content": [part()]}]}, "Only the user"),
    "long": ({"messages": [{"role": "user", "content": [part(file_of(tone(40)))] * 2}]}, "at most 60 seconds"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CHATS)
def test_chats_that_are_refused(http, name):
    fields, reason = BAD_CHATS[name]
    assert reason in refusal(http.post("/v1/chat/completions", json=chat(part()) | fields))


def test_text_alone_is_answered_by_the_text_model(http):
    body = {"messages": [{"role": "user", "content": "only text"}], "logprobs": True}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"] == "only text" and choice["logprobs"]["content"]
    assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.filterwarnings("error")
def test_sound_is_not_tokenized(http):
    response = http.post("/tokenize", json={"messages": chat(part())["messages"]})
    assert "must be text" in refusal(response)


def test_text_models_refuse_sound_with_the_reason():
    with running(StubBackend()) as server, connect(server) as http:
        assert http.get("/v1/models").json()["data"][0]["input_modalities"] == ["text"]
        for body in (chat(part()), chat(TEXT, **SPOKEN), chat(TEXT, modalities=["audio"])):
            assert "reads and writes text only" in refusal(http.post("/v1/chat/completions", json=body))
        for path in ("transcriptions", "translations"):
            assert "text only" in refusal(http.post(f"/v1/audio/{path}", files={"file": ("a.wav", WAV)}))
        assert "text only" in refusal(http.post("/v1/audio/speech", json={"input": "one"}))


# --- several requests -------------------------------------------------------------------------------------------------


def test_replies_take_turns(server, http, backend):
    service = server.config.app.state.service
    backend.model.order.clear()
    backend.model.gate.clear()
    threads = []
    try:
        for index, word in enumerate(("long", "short")):
            body = {"input": f"{word} " * (300 if word == "long" else 5), "response_format": "wav"}
            threads.append(threading.Thread(target=http.post, args=("/v1/audio/speech",), kwargs={"json": body}))
            threads[-1].start()
            wait_until(lambda count=index + 1: service.num_waiting == count)
    finally:
        backend.model.gate.set()
    for thread in threads:
        thread.join()
    order = backend.model.order
    between = order[order.index("short") : len(order) - order[::-1].index("short")]
    assert between == ["short", "long"] * 5 + ["short"]  # the last event ends the reply


def test_decoded_sound_counts_among_the_open_bytes(monkeypatch):
    monkeypatch.setattr(limits, "OPEN_SOUND_BYTES", 0)
    small = file_of(np.zeros(4 * RATE, "int16"), kind="FLAC")  # 256 kB when decoded
    backend = speech_backend()
    with running(backend, max_open_bytes=300_000) as server, connect(server) as http:
        backend.model.gate.clear()
        thread = threading.Thread(target=transcribe, args=(http, small))
        thread.start()
        try:
            wait_until(lambda: backend.model.open == 1)
            assert len(small) < 10_000 and "already have" in refusal(transcribe(http, small), 429)
        finally:
            backend.model.gate.set()
        thread.join()
        assert transcribe(http, small).json()["text"] == "4.00 seconds at 16000"


def test_metrics_count_sound(http):
    def seconds(name):
        lines = http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"openmimo_audio_{name}_seconds_total"))

    heard, spoken = seconds("input"), seconds("output")
    http.post("/v1/chat/completions", json=chat(TEXT, part(), **SPOKEN))
    assert seconds("input") - heard == pytest.approx(0.5) and seconds("output") - spoken == pytest.approx(0.5)
