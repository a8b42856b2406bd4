"""The speech demo without its trainings: measurements of a model with random weights, and their page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_audio_checkpoint import save_tiny_audio_checkpoint

from openmimo.core.config import from_dict, to_dict
from openmimo.core.errors import ConfigError, DataError
from openmimo.data.audio.config import CorpusConfig
from openmimo.data.audio.corpus import SPEAK, Clip, Corpus, speech, transcription
from openmimo.data.audio.files import write_audio
from openmimo.demo.audio import measure, story
from openmimo.demo.audio.config import AudioDemoConfig
from openmimo.demo.audio.page import AudioFindings, write_page
from openmimo.engine.audio.engine import AudioEngine, AudioParams, speech_request
from recipes import audio_demo

pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("soxr", reason="the extra audio is not installed")


class StubJudge:
    """Embeds a recording as its level and its length."""

    def embed(self, samples_S, sample_rate):
        features = np.array([np.abs(samples_S).mean() + 1e-6, len(samples_S) / sample_rate])
        return features / np.linalg.norm(features)

    def voice(self, recordings, sample_rate):
        mean = np.mean([self.embed(samples, sample_rate) for samples in recordings], axis=0)
        return mean / np.linalg.norm(mean)


def corpus_of(folder: Path) -> Corpus:
    clips = []
    described = (
        ("a", "train", "allison", "one"),
        ("b", "heldout", "allison", None),
        ("c", "heldout", "allison", "two one"),
        ("d", "heldout", "allison", "three"),
        ("e", "other", "cards", "ten"),
        ("f", "other", "cards", "six"),
    )
    for name, split, voice, text in described:
        samples = 0.2 * np.sin(np.arange(40_000) * (1 + len(clips)) / 30).astype(np.float32)
        write_audio(folder / f"{name}.wav", samples)
        clips.append(Clip(f"{name}.wav", text, voice, 40_000 / 24_000, split, is_composed=name in "cd"))
    return Corpus(folder, tuple(clips))


def test_rows_ask_as_the_engine_does():
    """What the model is trained to answer is what `AudioEngine.transcribe` and `speak` ask."""
    clip = Clip("a.wav", "one two", "allison", 1.0, "train")
    engine, asked = AudioEngine.__new__(AudioEngine), []
    engine.generate = lambda prompt, params: asked.append((prompt, params.thinking)) or []
    engine.transcribe("a.wav", 24_000)
    request, reply = transcription(clip)
    request["content"][1]["audio"] = {"waveform": "a.wav", "sample_rate": 24_000}
    assert asked == [([request], reply["thinking"])]
    assert speech(clip)[0]["content"][0]["text"] == f"{SPEAK}one two"
    assert speech(clip)[1]["thinking"] == AudioParams().thinking
    assert speech_request("one two", None, None) == [{"role": "user", "content": f"{SPEAK}one two"}]


def test_the_recipe_survives_its_file():
    config = audio_demo.demo()
    assert from_dict(AudioDemoConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert config.decoder.init_from == f"{config.tokenizer.run_folder}/model"
    assert config.language.codec == f"{config.decoder.run_folder}/model"
    assert config.language.stages[0].mixture.sources[0].options["path"] == f"{config.tokenizer.corpus}/train.jsonl"


def test_another_config_in_the_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(story, "SpeakerJudge", StubJudge)
    config = replace(audio_demo.demo(), folder=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(replace(config, spoken=3))))
    with pytest.raises(ConfigError, match="contains a demo with other settings"):
        story.run(config)


def test_own_recordings_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(story, "SpeakerJudge", StubJudge)
    monkeypatch.setattr(story, "train_tokenizer", lambda config: pytest.fail("trained"))
    for name in "abc":
        write_audio(tmp_path / "sounds" / f"{name}.wav", np.zeros(48_000))
    recipe = audio_demo.demo()
    config = replace(
        recipe, folder=str(tmp_path / "demo"), corpus=CorpusConfig(sounds=str(tmp_path / "sounds")),
        tokenizer=replace(recipe.tokenizer, corpus=str(tmp_path / "corpus")),
    )  # fmt: skip
    with pytest.raises(DataError, match="lacks: at least 2 held-out composed sentences, 2 recordings of other voices"):
        story.run(config)
    with pytest.raises(DataError, match="lacks: at least 1 recordings of 1.5 to 8 s for training, 1 such recordings"):
        measure.check_measurable(Corpus(tmp_path, ()))
    measure.check_measurable(corpus_of(tmp_path))


@pytest.mark.slow
def test_measurements_and_page_of_a_model_with_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SpeakerJudge", StubJudge)
    monkeypatch.setattr(measure, "stoi", lambda decoded, target, rate: 0.5)
    save_tiny_audio_checkpoint(tmp_path / "language" / "model")
    (tmp_path / "tokenizer").mkdir()
    shutil.move(tmp_path / "language" / "codec", tmp_path / "tokenizer" / "model")
    corpus = corpus_of(tmp_path)
    tokenizer, model = tmp_path / "tokenizer" / "model", tmp_path / "language" / "model"
    quality = measure.measure_tokenizer(corpus, tokenizer, tmp_path / "sounds", 4)
    assert [round(row["bits_per_second"]) for row in quality["codebooks"]] == [
        200,
        400,
        575,
        750,
        925,
        1100,
        1275,
        1450,
    ]
    assert quality["clips"] == 1
    hearing = measure.measure_hearing(corpus, model, 5)
    assert hearing["heldout"]["references"] == ["two one", "three"]
    spoken = measure.measure_speech(corpus, model, tmp_path / "sounds", 2)
    assert set(spoken["similarities"][0]) == {"allison", "cards"}
    rows = [{"step": step, "loss/mel": 1.0 / step} for step in (1, 2)]
    (tmp_path / "tokenizer" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shutil.copy(tmp_path / "tokenizer" / "metrics.jsonl", tmp_path / "language")
    monkeypatch.setattr("openmimo.demo.audio.page.add_training_figures", lambda report, rows: None)
    config = audio_demo.demo()
    config = replace(
        config,
        folder=str(tmp_path),
        tokenizer=replace(config.tokenizer, run_folder=str(tmp_path / "tokenizer")),
        decoder=replace(config.decoder, run_folder=str(tmp_path / "tokenizer")),
        language=replace(config.language, run_folder=str(tmp_path / "language")),
    )
    data = {"minutes": {"train": 1.0, "train composed": 2.0}, "notes": []}
    results = json.loads(json.dumps([data, quality, hearing, spoken, {"data": 1.0}]))
    page = write_page(tmp_path, config, AudioFindings(*results)).read_text()
    assert page.count("<audio") == 5 + 4
    assert "as recorded" in page and "spoken by the model: two one" in page
    story._say(Console(quiet=True), AudioFindings(*results), tmp_path / "report.html", model)
