"""Generated sound in the formats of replies: files, and streams of pieces."""

import struct
from collections.abc import Sequence

import numpy as np

from openmimo.core.errors import UserError
from openmimo.data.audio.files import audio_bytes, optional_module, pcm_bytes, resample
from openmimo.engine.server.http.errors import invalid

PCM_RATE = 24_000  # samples per second of pcm in OpenAI's API, which has no header that could say another rate
MEDIA_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg", "pcm": "audio/pcm"}
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
_SOUND_FILE_NAMES = {"mp3": ("MP3", None), "opus": ("OGG", "OPUS"), "wav": ("WAV", None), "flac": ("FLAC", None)}
_UNKNOWN_BYTES = 0xFFFFFFFF  # size of a stream in a header, which players read as "until the end"


def writable_formats() -> list[str]:
    """The formats that this machine's libsndfile writes, and pcm."""
    soundfile = optional_module("soundfile")
    known = soundfile.available_formats()
    return [
        name
        for name, (container, subtype) in _SOUND_FILE_NAMES.items()
        if container in known and (subtype is None or subtype in soundfile.available_subtypes(container))
    ] + ["pcm"]


def check_format(name: str, param: str) -> str:
    """Return the format, where pcm16 is pcm. Raises ApiError for one that cannot be written."""
    name = "pcm" if name == "pcm16" else name
    if name not in (writable := writable_formats()):
        raise invalid(f"{name} cannot be written here; give one of {', '.join(writable)}.", param)
    return name


def sound_file(waveform: np.ndarray, sample_rate: int, name: str) -> bytes:
    """Return a whole reply in a format. Raises UserError if it cannot be encoded."""
    if name == "pcm":
        stream = PcmStream(sample_rate)
        return stream.push(waveform) + stream.finish()
    if name == "opus" and sample_rate not in _OPUS_RATES:
        waveform, sample_rate = resample(waveform, sample_rate, PCM_RATE), PCM_RATE
    return audio_bytes(waveform, sample_rate, f".{name}")


class PcmStream:
    """Samples as signed 16-bit integers at `PCM_RATE`."""

    def __init__(self, sample_rate: int):
        self._resampler = (
            None
            if sample_rate == PCM_RATE
            else optional_module("soxr").ResampleStream(sample_rate, PCM_RATE, 1, dtype="float32")
        )

    def push(self, waveform: np.ndarray) -> bytes:
        """Return the bytes that new samples complete."""
        return pcm_bytes(waveform if self._resampler is None else self._resampler.resample_chunk(waveform))

    def finish(self) -> bytes:
        """Return the bytes that the resampler still holds."""
        if self._resampler is None:
            return b""
        return pcm_bytes(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))


class WavStream:
    """A wav file of unknown length: a header, then samples as they come."""

    def __init__(self, sample_rate: int):
        self._header = _wav_header(sample_rate)

    def push(self, waveform: np.ndarray) -> bytes:
        """Return the bytes of new samples, after the header at the first call."""
        header, self._header = self._header, b""
        return header + pcm_bytes(waveform)

    def finish(self) -> bytes:
        """Return the header if there were no samples."""
        return self.push(np.zeros(0, np.float32))


class FileStream:
    """A format that is written at the end only."""

    def __init__(self, sample_rate: int, name: str):
        self._sample_rate = sample_rate
        self._name = name
        self._pieces: list[np.ndarray] = []

    def push(self, waveform: np.ndarray) -> bytes:
        """Keep new samples."""
        self._pieces.append(waveform)
        return b""

    def finish(self) -> bytes:
        """Return the whole file."""
        return sound_file(joined(self._pieces), self._sample_rate, self._name)


def sound_stream(sample_rate: int, name: str) -> PcmStream | WavStream | FileStream:
    """Return the stream of a format."""
    if name == "pcm":
        return PcmStream(sample_rate)
    return WavStream(sample_rate) if name == "wav" else FileStream(sample_rate, name)


def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Return pieces of sound as one."""
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def check_voice(voices: Sequence[str], voice: str | None, param: str) -> tuple[str | None, list[str]]:
    """Return the model's voice for a request, and warnings.

    A model with one voice speaks with it under every name, because clients must send a name.

    Raises:
        ApiError: The model has several voices, and this is none of them.
    """
    if voice is None or voice in voices:
        return voice, []
    if not voices:
        return None, [f"{param} has no effect, because the model has one voice"]
    raise invalid(f"There is no voice {voice!r}; the model has {', '.join(voices)}.", param)


def encoded(waveform: np.ndarray, sample_rate: int, name: str, param: str) -> bytes:
    """`sound_file` with ApiError for a reply that the format cannot hold."""
    try:
        return sound_file(waveform, sample_rate, name)
    except UserError as error:
        raise invalid(str(error), param) from error


def _wav_header(sample_rate: int) -> bytes:
    """The header of one channel of 16-bit samples until the end of the stream."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", _UNKNOWN_BYTES, b"WAVE") + form + struct.pack("<4sI", b"data", _UNKNOWN_BYTES)
