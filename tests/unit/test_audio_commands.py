"""`openmimo audio`: files in and out, streams on standard output, and errors that say what to do."""

import io
import sys

import numpy as np
import pytest
import torch

from openmimo import audio_commands, cli
from openmimo.data.audio.codes import Codes, load_codes, save_codes
from openmimo.data.audio.files import read_audio, write_audio
from openmimo.engine.audio.engine import AudioEvent
from openmimo.model.audio.config import tiny_codec
from openmimo.model.audio.tokenizer import AudioTokenizer, load_audio_tokenizer, save_audio_tokenizer

pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("soxr", reason="the extra audio is not installed")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = AudioTokenizer(tiny_codec())
    folder = tmp_path_factory.mktemp("audio") / "tokenizer"
    save_audio_tokenizer(tokenizer, str(folder))
    return str(folder)


def run(monkeypatch, *words: str) -> int:
    """Runs the command line; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["openmimo", "audio", *words])
    try:
        cli.main()
    except SystemExit as exited:
        return int(exited.code or 0)
    return 0


def test_encode_and_decode_go_through_files(tokenizer_folder, tmp_path, monkeypatch, capfd):
    sound = (0.3 * np.sin(np.arange(5000) / 20)).astype(np.float32)
    write_audio(tmp_path / "in.flac", sound, 8000)
    paths = [str(tmp_path / name) for name in ("in.flac", "sound.codes", "out.wav")]
    assert run(monkeypatch, "encode", paths[0], paths[1], "--tokenizer", tokenizer_folder, "--codebooks", "3") == 0
    assert "16 frames of 3 codes for 0.62 s of sound, 0.57 kbit/s (resampled from 8,000 Hz" in capfd.readouterr().out
    assert run(monkeypatch, "decode", paths[1], paths[2], "--tokenizer", tokenizer_folder) == 0
    codes = load_codes(tmp_path / "sound.codes")
    assert (codes.codes_FQ.shape, codes.num_samples) == ((16, 3), 15_000)
    whole = load_audio_tokenizer(tokenizer_folder).decode(torch.from_numpy(codes.codes_FQ).long())[:15_000].numpy()
    assert np.abs(read_audio(paths[2]).samples_S - np.clip(whole, -1, 1)).max() < 1e-4
    capfd.readouterr()
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=True))
    assert run(monkeypatch, "decode", paths[1], "-", "--tokenizer", tokenizer_folder) == 0
    assert np.abs(np.frombuffer(raw.getvalue(), "<i2") / 32767 - np.clip(whole, -1, 1)).max() < 1e-3
    monkeypatch.undo()
    assert run(monkeypatch, "decode", paths[1], paths[2], "--tokenizer", tokenizer_folder, "--codebooks", "4") == 1
    assert "--codebooks is 4; these codes have 1 to 3" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("encode", "none.wav", "out.codes"), 1, "none.wav does not exist"),
        (("encode", "text.wav", "out.codes"), 1, "text.wav cannot be read as audio"),
        (("decode", "text.wav", "out.wav"), 1, "text.wav is no file of codes"),
        (("decode", "text.wav", "out.aiff"), 1, "out.aiff must end in one of .wav"),
        (("speak", "hello", "text.wav", "--voice", "./text.wav"), 1, "text.wav is the source, which would be lost"),
        (("transcribe", "text.wav"), 1, "text.wav cannot be read as audio"),
        (("transcribe",), 2, "needs at least one audio file"),
        (("transcribe", "a.wav", "--temperature", "1"), 2, "--temperature"),
        (("transcribe", "a.wav", "--seed", "1"), 2, "--seed"),
        (("speak", "hello", "out.wav"), 1, "there is no runs/audio/language/model yet"),
        (("speak", "hello"), 2, "Missing from openmimo audio speak: DESTINATION"),
        (("chat", "--model", "nowhere"), 1, "nowhere"),
        (("sing",), 2, "openmimo audio has no command 'sing'"),
        (("language", "audio_demo"), 1, "Functions: tokenizer, decoder, language, demo"),
        (("data", "out", "--sounds", "nowhere"), 1, "nowhere is no folder"),
        (("data", "out", "--held-out", "2"), 1, "held_out must lie between 0 and 1"),
    ],
)
def test_errors_say_what_to_do(words, code, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.wav").write_text("this is no audio")
    assert run(monkeypatch, *words) == code
    said = capfd.readouterr()
    assert message in " ".join(said.err.split())
    assert "Traceback" not in said.err


@pytest.mark.parametrize("destination", ["b.wav", "a.wav", "new.opus", "a.G722", "notes"])
def test_encode_destroys_no_recording(destination, tokenizer_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_audio("a.wav", np.zeros(2400))
    write_audio("b.wav", np.ones(2400))
    (tmp_path / "notes").write_text("text")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(monkeypatch, "encode", "a.wav", destination, "--tokenizer", tokenizer_folder) == 1
    assert "Name a" in " ".join(capfd.readouterr().err.split())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_encode_replaces_codes(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_audio("a.wav", np.zeros(2400))
    save_codes(tmp_path / "a.codes", Codes(np.zeros((1, 1), np.int32), 7))
    assert run(monkeypatch, "encode", "a.wav", "a.codes", "--tokenizer", tokenizer_folder) == 0
    assert load_codes(tmp_path / "a.codes").num_samples == 2400


def test_files_that_are_no_codes_are_refused(tmp_path):
    from safetensors.numpy import save_file

    from openmimo.core.errors import DataError

    save_file({"weights": np.zeros((2, 2), np.float32)}, tmp_path / "weights.safetensors")
    save_file({"codes": np.zeros((2, 2), np.float32)}, tmp_path / "floats.safetensors")
    for name in ("weights", "floats"):
        with pytest.raises(DataError, match="but none of codes"):
            load_codes(tmp_path / f"{name}.safetensors")
    save_codes(tmp_path / "codes", Codes(np.arange(6).reshape(2, 3), 100))
    assert load_codes(tmp_path / "codes").first(2).codes_FQ.tolist() == [[0, 1], [3, 4]]


class StubEngine:
    """Hears the length of a recording, and says the words of a text as tones."""

    sample_rate = 24_000

    def transcription(self, waveform, sample_rate, params):
        yield AudioEvent(text=f" {len(waveform) / sample_rate:.1f} seconds")
        yield AudioEvent(finish_reason="stop" if params.max_tokens > 5 else "length")

    def speech(self, text, instruction, voice, *, params):
        for _ in text.split()[: params.max_tokens]:
            yield AudioEvent(waveform=np.full(2400, 0.25, np.float32))
        yield AudioEvent(finish_reason="stop" if len(text.split()) <= params.max_tokens else "length")

    def chat(self, messages, params):
        kinds = [part["type"] for part in messages[-1]["content"]]
        yield AudioEvent(text=f"heard {kinds[0]}")
        yield AudioEvent(waveform=np.full(100, 0.5, np.float32), finish_reason="stop")


def test_replies_that_are_cut_off_are_errors(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(audio_commands, "_engine", lambda options: StubEngine())
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "speak", "three words here", "out.wav", "--max-tokens", "2") == 1
    assert "the speech is cut off after 2 tokens" in " ".join(capfd.readouterr().err.split())
    assert read_audio("out.wav").seconds == 0.2
    assert run(monkeypatch, "transcribe", "out.wav", "--max-tokens", "2") == 1
    said = capfd.readouterr()
    assert said.out == "0.2 seconds\n" and "out.wav is cut off after 2 tokens" in " ".join(said.err.split())
    assert run(monkeypatch, "speak", " ", "-") == 1
    assert "the model said nothing" in " ".join(capfd.readouterr().err.split())


def test_transcribe_speak_and_chat(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(audio_commands, "_engine", lambda options: StubEngine())
    monkeypatch.chdir(tmp_path)
    write_audio("a.wav", np.zeros(12_000))
    write_audio("b.wav", np.zeros(4_000), 8_000)
    assert run(monkeypatch, "transcribe", "a.wav") == 0
    assert capfd.readouterr().out == "0.5 seconds\n"
    assert run(monkeypatch, "transcribe", "a.wav", "b.wav") == 0
    said = capfd.readouterr()
    assert said.out == "a.wav: 0.5 seconds\nb.wav: 0.5 seconds\n"
    assert "b.wav: resampled from 8,000 Hz" in said.err
    assert run(monkeypatch, "speak", "two words", "out.ogg") == 0
    assert read_audio("out.ogg").seconds == 0.2
    assert run(monkeypatch, "speak", " ", "silent.wav") == 1
    assert "the model said nothing" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "silent.wav").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\na.wav\nnone.wav\n"))
    assert run(monkeypatch, "chat", "--folder", "replies") == 0
    said = capfd.readouterr()
    assert said.out.split("\n")[:4] == ["heard text", "replies/reply-1.wav", "heard audio", "replies/reply-2.wav"]
    assert "none.wav does not exist" in said.err
    assert len(read_audio("replies/reply-1.wav").samples_S) == 100
    (tmp_path / "replies" / "reply-old.wav").touch()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert run(monkeypatch, "chat", "--folder", "replies") == 0
    assert capfd.readouterr().out.split("\n")[:2] == ["heard text", "replies/reply-3.wav"]
