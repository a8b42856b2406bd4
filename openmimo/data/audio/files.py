"""Reads and writes audio files: any format of libsndfile (wav, flac, ogg, mp3 and others) as mono float32.

soundfile decodes and soxr resamples, both in blocks: the memory for a file is that of its result, and at most one block
of its channels. Both packages are optional (`pip install openmimo[audio]`).
"""

import contextlib
import importlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from openmimo.core.errors import ConfigError, DataError
from openmimo.core.files import new_file_atomic, require_file

SAMPLE_RATE = 24_000
"""Samples per second of MiMo-Audio's tokenizer."""
MAX_SECONDS = 1800.0
"""Longest recording that is read by default; `max_audio_seconds` of the released tokenizer."""
FORMATS = {
    ".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"), ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", None),
}  # fmt: skip
"""Formats that are written, by the ending of the file's name."""

_RATES = range(4_000, 384_001)
_BLOCK_VALUES = 1 << 18
_LARGEST_VALUE = 1e3
_WRITTEN_SAMPLES = 1 << 15  # libsndfile's Vorbis encoder takes its memory for a block from the stack


@dataclass(frozen=True)
class Recording:
    """One recording in memory.

    Attributes:
        samples_S: Float32 array of mono samples, between -1 and 1 in files of integers.
        sample_rate: Samples per second of `samples_S`.
        file_rate: Samples per second of the file.
        file_channels: Channels of the file, whose mean is `samples_S`.
    """

    samples_S: np.ndarray
    sample_rate: int
    file_rate: int
    file_channels: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.samples_S) / self.sample_rate

    @property
    def note(self) -> str:
        """What the conversion means for the listener; "" for a mono file with the requested rate or a higher one."""
        notes = []
        if self.file_channels > 1:
            notes.append(f"the mean of {self.file_channels} channels")
        if self.file_rate < self.sample_rate:
            notes.append(
                f"resampled from {self.file_rate:,} Hz, so that it has no content above {self.file_rate // 2:,} Hz"
            )
        return "; ".join(notes)


def read_audio(
    source: Path | str | bytes, *, sample_rate: int = SAMPLE_RATE, max_seconds: float = MAX_SECONDS, name: str = ""
) -> Recording:
    """Reads a recording as mono with `sample_rate` samples per second.

    Args:
        source: The path of a regular file, or the bytes of one.
        sample_rate: Samples per second of the result.
        max_seconds: The longest recording that is accepted.
        name: What messages call the source (default: the path, or "the audio").

    Raises:
        ConfigError: The packages of the extra `audio` are not installed.
        DataError: The source is no audio file, is empty, too long or damaged, or contains values that are not finite or
            above 1,000.
    """
    name = name or ("the audio" if isinstance(source, bytes) else str(source))
    soundfile = optional_module("soundfile")
    with _opened(source) as file:
        try:
            with soundfile.SoundFile(file, closefd=False) as sound:
                return _read(sound, sample_rate, max_seconds, name)
        except soundfile.SoundFileError as error:
            raise DataError(
                f"{name} cannot be read as audio ({_reason(error)}). Formats: wav, flac, ogg, mp3 and others of "
                f"libsndfile {soundfile.__libsndfile_version__}; convert other files first, for example with ffmpeg."
            ) from error


def resample(samples_S: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resamples mono float32 samples (soxr, high quality); returns them unchanged if the rates are equal."""
    if source_rate == target_rate:
        return samples_S
    return optional_module("soxr").resample(samples_S, source_rate, target_rate).astype(np.float32, copy=False)


def write_audio(path: Path | str, samples_S: np.ndarray, sample_rate: int = SAMPLE_RATE) -> Path:
    """Writes mono samples as a file whose format its name's ending says. The file appears when it is complete.

    Raises:
        ConfigError: The ending is none of `FORMATS`, or the extra `audio` is not installed.
        OSError: The file cannot be written.
    """
    with audio_writer(path, sample_rate) as write:
        write(samples_S)
    return Path(path)


@contextlib.contextmanager
def audio_writer(path: Path | str, sample_rate: int = SAMPLE_RATE) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends mono samples to a file, which appears under its name after the block.

    Values outside -1 to 1 are clipped. The encoded file is in memory until the block ends, because libsndfile does not
    report a full disk. Raises as `write_audio`.
    """
    path = Path(path)
    kind, subtype = format_of(path)
    encoded = io.BytesIO()
    with _sound_writer(encoded, sample_rate, kind, subtype) as write:
        yield write
    with new_file_atomic(path) as file:
        file.write(encoded.getbuffer())


def audio_bytes(samples_S: np.ndarray, sample_rate: int = SAMPLE_RATE, ending: str = ".wav") -> bytes:
    """Returns mono samples as the bytes of a file with this ending. Raises as `write_audio`."""
    kind, subtype = format_of(Path(f"audio{ending}"))
    file = io.BytesIO()
    with _sound_writer(file, sample_rate, kind, subtype) as write:
        write(samples_S)
    return file.getvalue()


def pcm_bytes(samples_S: np.ndarray) -> bytes:
    """Returns mono samples as raw signed 16-bit little-endian integers, those that a wav file of them has.

    Values outside -1 to 1 are clipped.
    """
    file = io.BytesIO()
    with _sound_writer(file, SAMPLE_RATE, "RAW", "PCM_16") as write:
        write(samples_S)
    return file.getvalue()


def format_of(path: Path) -> tuple[str, str | None]:
    """Returns libsndfile's format and subtype for a file's name. Raises ConfigError if its ending is not known."""
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise ConfigError(f"{path} must end in one of {', '.join(FORMATS)}, which says the format of the file.")
    return found


def optional_module(name: str, extra: str = "audio") -> Any:
    """Imports a package of an extra. Raises ConfigError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(name)
    except (ModuleNotFoundError, OSError) as error:  # OSError: soundfile without its library
        raise ConfigError(f"this needs the package {name} ({error}): pip install openmimo[{extra}]") from error


class _Content(io.BytesIO):
    """The bytes of a file, in which a seek before the beginning has no effect.

    Damaged files make libsndfile try one. An error in its callback would be printed with a traceback.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As `io.BytesIO.seek`, without an error."""
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


@contextlib.contextmanager
def _opened(source: Path | str | bytes) -> Iterator[BinaryIO | int]:
    """The source as a file for soundfile. A descriptor, so that the content says the format and not the name."""
    if isinstance(source, bytes):
        yield _Content(source)
        return
    descriptor = os.open(require_file(source, DataError), os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(sound: Any, sample_rate: int, max_seconds: float, name: str) -> Recording:
    if sound.samplerate not in _RATES:
        raise DataError(
            f"{name} says that it has {sound.samplerate:,} samples per second; {_RATES.start:,} to {_RATES[-1]:,} "
            "are accepted. Its header may be damaged."
        )
    if (seconds := sound.frames / sound.samplerate) > max_seconds:
        raise DataError(
            f"{name} is longer than the limit: {seconds:,.0f} of at most {max_seconds:,.0f} seconds. Cut it into "
            "parts, or set a higher limit (--max-seconds)."
        )
    stream = None
    if sound.samplerate != sample_rate:
        stream = optional_module("soxr").ResampleStream(sound.samplerate, sample_rate, 1, dtype="float32")
    blocks = [mono if stream is None else stream.resample_chunk(mono) for mono in _mono_blocks(sound, name)]
    if stream is not None:
        blocks.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not len(samples):
        raise DataError(f"{name} contains no samples. Record or choose another file.")
    return Recording(samples, sample_rate, sound.samplerate, sound.channels)


def _mono_blocks(sound: Any, name: str) -> Iterator[np.ndarray]:
    """The mean of the channels, block by block."""
    read = 0
    while len(block := sound.read(max(1, _BLOCK_VALUES // sound.channels), dtype="float32", always_2d=True)):
        is_usable = (np.abs(block) <= _LARGEST_VALUE).all(axis=1)  # not so for values that are no numbers
        if not is_usable.all():
            place = int(np.argmin(is_usable))
            is_finite = bool(np.isfinite(block[place]).all())
            large = f"above {_LARGEST_VALUE:,.0f}, and samples lie between -1 and 1,"
            found = large if is_finite else "that is not a finite number"
            raise DataError(
                f"{name} has a value {found} at sample {read + place:,} ({(read + place) / sound.samplerate:.3f} s). "
                "Export it again from its source."
            )
        read += len(block)
        yield block.mean(axis=1)


@contextlib.contextmanager
def _sound_writer(
    file: BinaryIO, sample_rate: int, kind: str, subtype: str | None
) -> Iterator[Callable[[np.ndarray], None]]:
    soundfile = optional_module("soundfile")
    endian = "LITTLE" if kind == "RAW" else None  # other formats have their own order
    with soundfile.SoundFile(file, "w", sample_rate, 1, format=kind, subtype=subtype, endian=endian) as sound:

        def write(samples_S: np.ndarray) -> None:
            clipped = np.clip(np.asarray(samples_S, np.float32), -1, 1)
            for start in range(0, len(clipped), _WRITTEN_SAMPLES):
                sound.write(clipped[start : start + _WRITTEN_SAMPLES])

        yield write


def _reason(error: Exception) -> str:
    """The reason in an error of soundfile, without the name of the object that it opened."""
    return str(error).rpartition(": ")[2].rstrip(".")
