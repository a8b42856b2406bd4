"""`openmimo serve` and `openmimo eval` with an audio model, small and with random weights."""

import io
import json

import numpy as np
import pytest
import torch
from fake_speech import tone
from server_thread import connect, running, wait_until
from tiny_audio_checkpoint import save_tiny_audio_checkpoint

from openmimo.core.errors import UserError
from openmimo.engine.audio.engine import AudioEngine
from openmimo.engine.engine import Engine
from openmimo.engine.server.backends.audio import AudioModel, read_voices
from openmimo.engine.server.backends.engine import EngineBackend
from openmimo.engine.server.backends.speech import (
    ChatWork,
    Clip,
    SpeakWork,
    SpeechBackend,
    SpeechMessage,
    SpeechSampling,
    TranscribeWork,
)
from openmimo.evals.config import EvalConfig
from openmimo.evals.runner import run_and_print
from openmimo.model.audio.language_config import is_audio_folder

soundfile = pytest.importorskip("soundfile", reason="needs the extra audio")
pytest.importorskip("soxr", reason="needs the extra audio")
SOUND = tone(1.0, 24_000)
SAID = "hello world, what a fine day it is."  # long enough that a random model must speak


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio") / "tiny"
    save_tiny_audio_checkpoint(folder)
    (folder / "voices").mkdir()
    soundfile.write(folder / "voices" / "ann.wav", tone(1.0, 8000), 8000)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return AudioEngine(folder)


@pytest.fixture(scope="module")
def model(engine, folder):
    return AudioModel(engine, read_voices(folder, engine.sample_rate))


def collected(events):
    events = list(events)
    pieces = [event.waveform for event in events if event.waveform is not None]
    waveform = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return "".join(event.text for event in events), waveform, events[-1].finish_reason


def test_the_model_answers_as_its_engine_does(engine, model):
    sampling = SpeechSampling(6, text_temperature=0.0, seed=3)
    text, _, reason = collected(model.events(TranscribeWork(Clip(SOUND, 24_000)), sampling))
    assert text.strip() == engine.transcribe(SOUND, 24_000, max_tokens=6) and reason
    sampling = SpeechSampling(60, audio_temperature=0.0, seed=3)
    _, waveform, reason = collected(model.events(SpeakWork(SAID, voice="ann"), sampling))
    assert len(waveform) and reason == "stop"
    _, other, _ = collected(model.events(SpeakWork(SAID), sampling))
    assert not np.array_equal(waveform, other)
    chat = ChatWork((SpeechMessage("user", ("hello", Clip(SOUND, 24_000))),), "interleaved")
    text, waveform, reason = collected(model.events(chat, SpeechSampling(12, text_temperature=1.0, seed=1)))
    assert (text or len(waveform)) and reason in ("stop", "length")


def test_speech_says_that_the_limit_ended_it(engine, model, monkeypatch):
    empty, size = engine.builder.tokens.empty, engine.model.config.vocab_size

    def head(states_TD, reader=None):
        return torch.nn.functional.one_hot(torch.full((len(states_TD),), empty), size).float()

    monkeypatch.setattr(engine.model.lm_head, "forward", head)
    _, waveform, reason = collected(model.events(SpeakWork("hello"), SpeechSampling(12)))
    assert len(waveform) and reason == "length"


def test_replies_without_a_seed_differ(model):
    chat = ChatWork((SpeechMessage("user", ("hello",)),))
    texts = {collected(model.events(chat, SpeechSampling(8, text_temperature=1.0)))[0] for _ in range(3)}
    assert len(texts) > 1
    seeded = SpeechSampling(8, text_temperature=1.0, seed=0)
    assert len({collected(model.events(chat, seeded))[0] for _ in range(2)}) == 1


def test_a_chat_has_the_recording_of_its_voice(model):
    """Zero temperatures: only the recording can make the replies differ."""
    sampling = SpeechSampling(12, audio_temperature=0.0, seed=3)
    turns = (SpeechMessage("system", ("be kind",)), SpeechMessage("user", ("hello",)))
    works = [ChatWork(turns, "interleaved", voice=voice) for voice in ("ann", None)]
    voiced, plain = (collected(model.events(work, sampling)) for work in works)
    assert voiced[0] != plain[0] or not np.array_equal(voiced[1], plain[1])
    assert model.prompt_counts(works[0])[1] == 7 and model.prompt_counts(works[1])[1] == 0


@pytest.mark.slow
def test_prompts_are_counted_and_long_ones_refused(engine, model):
    work = TranscribeWork(Clip(SOUND, 24_000))
    num_text, num_patches = model.prompt_counts(work)
    assert num_text > 0 and num_patches == 7  # 6.25 patches a second
    with pytest.raises(UserError, match="positions"):
        model.check(TranscribeWork(Clip(np.zeros(24_000 * 170, np.float32), 24_000)))
    model.check(SpeakWork("hello" * 60))
    with pytest.raises(UserError, match="positions"):
        model.check(SpeakWork("hello" * 350))
    with pytest.raises(UserError, match="no text"):
        model.check(SpeakWork("  "))


def test_folders_of_audio_models_are_known(folder, tmp_path):
    assert is_audio_folder(folder) and not is_audio_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert not is_audio_folder(tmp_path)


@pytest.mark.slow
def test_a_served_model_with_the_openai_client(engine, model):
    openai = pytest.importorskip("openai", reason="needs the openai client")
    text = EngineBackend(Engine(engine.model, engine.tokenizer), engine.tokenizer, model_name="tiny")
    file = io.BytesIO()
    soundfile.write(file, SOUND, 24_000, format="WAV")
    with (
        running(SpeechBackend(model, text)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        texts = [
            client.audio.transcriptions.create(model="tiny", file=("a.wav", file.getvalue()), extra_body={"seed": 1})
            for _ in range(2)
        ]
        assert texts[0].text == texts[1].text
        spoken = client.audio.speech.create(
            model="tiny", voice="ann", input=SAID, response_format="flac", extra_body={"seed": 2}
        )
        samples, rate = soundfile.read(io.BytesIO(spoken.content))
        assert rate == 24_000 and len(samples) > 1000
        plain = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5, logprobs=True
        )
        assert len(plain.choices[0].logprobs.content) == 5
        with connect(server) as http:
            body = {"input": "hello " * 60, "response_format": "pcm"}
            with http.stream("POST", "/v1/audio/speech", json=body) as response:
                next(response.iter_raw())
            wait_until(lambda: server.config.app.state.service.backend.gauges().num_running == 0)


@pytest.mark.slow
def test_a_suite_of_speech_is_measured_and_resumed(folder, tmp_path, capsys):
    output = tmp_path / "scores.json"
    config = EvalConfig(
        path=str(folder),
        suite="speech",
        options={"voices": "tones"},
        examples=2,
        run_folder=str(tmp_path / "run"),
        output=str(output),
        device="cpu",
    )
    run_and_print(config)
    results = json.loads(output.read_text())["results"]
    assert len({one["task"] for one in results}) == 9
    for one in results:
        assert one["low"] <= one["value"] <= one["high"] and one["judge"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert list((tmp_path / "run" / "sounds").glob("*_reference.wav"))
    run_and_print(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    assert json.loads(output.read_text())["results"] == results
    capsys.readouterr()


@pytest.mark.slow
def test_audio_tasks_refuse_what_has_no_effect(folder, tmp_path):
    for options, reason in (
        ({"lengths": (64,)}, "--lengths has no effect"),
        ({"options": {"voices": str(tmp_path / "none")}}, "voices is"),
        ({"path": str(tmp_path)}, "no audio model"),
        ({"task": "needle"}, "give --suite speech"),
    ):
        with pytest.raises(UserError, match=reason):
            run_and_print(EvalConfig(**{"path": str(folder), "task": "transcription", "device": "cpu"} | options))
