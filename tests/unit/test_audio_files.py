"""Audio files: what is read equals what was written, and unusable audio is refused with a reason."""

import io
import math
import os
import struct

import numpy as np
import pytest

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.audio import files
from openmimo.data.audio.files import audio_bytes, audio_writer, pcm_bytes, read_audio, resample, write_audio

soundfile = pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("soxr", reason="the extra audio is not installed")


def tone(seconds: float = 0.5, rate: int = 24_000, hertz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * math.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("ending", files.FORMATS)
def test_every_format_is_read_as_it_was_written(ending, tmp_path):
    path = write_audio(tmp_path / f"tone{ending}", tone())
    assert soundfile.info(path).format == files.FORMATS[ending][0]
    recording = read_audio(path)
    assert (recording.sample_rate, recording.file_rate, recording.file_channels) == (24_000, 24_000, 1)
    assert recording.note == ""
    assert abs(recording.seconds - 0.5) < 0.1  # mp3 adds silence
    if ending in (".wav", ".flac"):
        assert np.abs(recording.samples_S - tone()).max() < 1e-4
    with open(path, "rb") as file:
        assert np.array_equal(read_audio(file.read()).samples_S, recording.samples_S)


def test_eight_kilohertz_in_two_channels_becomes_mono_at_the_requested_rate_with_a_note():
    stereo = np.stack([tone(rate=8000), np.zeros(4000, np.float32)], axis=1)
    file = io.BytesIO()
    soundfile.write(file, stereo, 8000, format="WAV", subtype="FLOAT")
    recording = read_audio(file.getvalue())
    assert recording.note == "the mean of 2 channels; resampled from 8,000 Hz, so that it has no content above 4,000 Hz"
    assert len(recording.samples_S) == 12_000
    assert correlation(recording.samples_S[500:-500], tone()[500:-500]) > 0.9999
    assert np.abs(recording.samples_S[500:-500] - 0.5 * tone()[500:-500]).max() < 1e-3


def test_reading_in_blocks_gives_the_samples_of_resampling_the_whole(monkeypatch):
    data = audio_bytes(tone(rate=16_000, seconds=0.3), 16_000, ".wav")
    monkeypatch.setattr(files, "_BLOCK_VALUES", 777)
    in_blocks = read_audio(data).samples_S
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    assert np.array_equal(in_blocks, resample(whole, 16_000, 24_000))


def damaged(value: float, rate: int = 24_000) -> bytes:
    file = io.BytesIO()
    samples = tone()
    samples[1200] = value
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def wrong_rate(rate: int) -> bytes:
    data = bytearray(audio_bytes(tone(0.01)))
    data[24:28] = struct.pack("<I", rate)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as audio"),
        (b"hello, this is a text" * 100, "cannot be read as audio"),
        (audio_bytes(tone())[:30], "cannot be read as audio"),
        (audio_bytes(np.zeros(0, np.float32)), "contains no samples"),
        (damaged(math.nan), r"not a finite number at sample 1,200 \(0.050 s\)"),
        (damaged(math.inf), r"not a finite number at sample 1,200 \(0.050 s\)"),
        (damaged(1e37), r"a value above 1,000, and samples lie between -1 and 1, at sample 1,200 \(0.050 s\)"),
        (damaged(-1e37, 8000), r"a value above 1,000, .* at sample 1,200 \(0.150 s\)"),
        (wrong_rate(1), "says that it has 1 samples per second"),
        (wrong_rate(2**30), "says that it has 1,073,741,824 samples per second"),
    ],
    ids=[
        "nothing",
        "text",
        "half a header",
        "no samples",
        "nan",
        "infinity",
        "huge",
        "huge at 8 kHz",
        "one hertz",
        "a gigahertz",
    ],
)
def test_unusable_audio_is_refused_with_a_reason(data, message, tmp_path):
    with pytest.raises(DataError, match=f"^the audio .*{message}|^the audio {message}"):
        read_audio(data)
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"clip.wav.*{message}"):
        read_audio(path)


def test_an_hour_is_refused_from_its_header_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "hour.wav"
    with soundfile.SoundFile(path, "w", 4000, 1, "PCM_U8") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 4000, np.float32))
    monkeypatch.setattr(files, "_mono_blocks", None)
    with pytest.raises(DataError, match=r"longer than the limit: 3,600 of at most 1,800 seconds.*--max-seconds"):
        read_audio(path)


def test_a_header_that_claims_more_than_the_file_has_is_not_believed():
    data = bytearray(audio_bytes(tone()))
    data[40:44] = struct.pack("<I", 0xFFFFFFFF)  # as programs that write to a pipe leave it
    assert read_audio(bytes(data)).seconds == 0.5


def test_paths_that_are_no_files_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for name, reason in (("none.wav", "does not exist"), ("pipe.wav", "not a file"), (".", "not a file")):
        with pytest.raises(DataError, match=reason):
            read_audio(tmp_path / name)


def test_an_interrupted_writer_leaves_the_earlier_file(tmp_path):
    path = write_audio(tmp_path / "tone.wav", tone())
    with pytest.raises(RuntimeError), audio_writer(path) as write:
        write(tone(1.0))
        raise RuntimeError
    assert read_audio(path).seconds == 0.5
    assert os.listdir(tmp_path) == ["tone.wav"]


def test_values_beyond_full_scale_are_clipped_and_not_wrapped(tmp_path):
    loud = np.array([2.0, -2.0, 0.5], np.float32)
    assert np.allclose(read_audio(write_audio(tmp_path / "loud.wav", loud)).samples_S, [1, -1, 0.5], atol=1e-4)
    assert pcm_bytes(loud) == struct.pack("<3h", 32767, -32768, 16384)
    assert pcm_bytes(tone()) == audio_bytes(tone(), ending=".wav")[44:]  # a stream has the samples of a file


def test_the_name_of_a_written_file_says_its_format(tmp_path):
    with pytest.raises(ConfigError, match=r"tone.aiff must end in one of .wav, .flac, .ogg, .opus, .mp3"):
        write_audio(tmp_path / "tone.aiff", tone())


def test_without_the_packages_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ConfigError, match=r"pip install openmimo\[audio\]"):
        read_audio(b"")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_file_prints_no_traceback():
    file = io.BytesIO()
    soundfile.write(file, np.zeros(800, np.float32), 16_000, format="AIFF")
    content = bytearray(file.getvalue())
    content[38] = 255  # libsndfile seeks before the beginning
    with pytest.raises(DataError):
        read_audio(bytes(content), max_seconds=1)
