"""Rows of training data: files of conversations and of documents, in the format of the public training toolkit.

A row is a list of messages (`openmimo.model.audio.conversation`), an object with such a list under "messages", or a
document for pre-training, all of which is predicted:

    {"content": [{"type": "text", "text": "..."}, {"type": "audio", "audio": "clip.wav"},
                 {"type": "speech", "text": "...", "audio": "clip.wav"}]}

"speech" interleaves text and audio. A file has one row a line (.jsonl), or is one list of rows (.json). The value of
"audio" is the path of a sound file, or of codes [frames, codebooks] in a .npy file, relative to the file of rows.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from openmimo.core.errors import CheckpointError, DataError
from openmimo.core.files import new_folder_atomic, parse_json, read_text, require_file
from openmimo.data.audio.files import read_audio
from openmimo.data.config import MixtureConfig
from openmimo.model.audio.conversation import conversation_parts
from openmimo.model.audio.sequence import AudioPart, Part, SpeechPart, TextPart
from openmimo.model.audio.tokenizer import AudioTokenizer

_MOST_CODES = 1 << 27
_STORED_EVERY = 256  # clips


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        value: The list of messages, or the object with "content".
        where: File and number, for messages.
        folder: The folder to which paths are relative.
    """

    value: Any
    where: str
    folder: Path

    @property
    def digest(self) -> bytes:
        """The hash of the content."""
        return hashlib.sha256(json.dumps(self.value, sort_keys=True).encode()).digest()

    def texts(self) -> Iterator[str]:
        """Yield all texts of the row."""
        yield from _strings(self.value, ("text", "content", "Chain-of-thought"))

    def clips(self) -> Iterator[Path]:
        """Yield the paths of all audio of the row."""
        for name in _strings(self.value, ("audio",)):
            yield self.folder / name

    def parts(self, codes_of: Callable[[Path], torch.Tensor]) -> list[Part]:
        """Return the parts of the row. Raises DataError if it has another form."""

        def codes(name: Any) -> torch.Tensor:
            if not isinstance(name, str) or not name or "\0" in name:
                raise DataError(f"{self.where}: audio must be the path of a file.")
            return codes_of(self.folder / name)

        if isinstance(self.value, Mapping) and "content" in self.value and "role" not in self.value:
            return [_document_part(item, codes, self.where) for item in _listed(self.value["content"], self.where)]
        messages = self.value.get("messages") if isinstance(self.value, Mapping) else self.value
        return conversation_parts(_listed(messages, self.where), codes, where=self.where)


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows. Raises DataError if it is missing, empty or damaged."""
    text, folder = read_text(path, DataError), path.parent
    if path.suffix == ".json":
        values = parse_json(text, str(path), DataError)
        rows = [Row(value, f"{path}, row {number}", folder) for number, value in enumerate(_listed(values, str(path)))]
    else:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        rows = [
            Row(parse_json(line, f"{path}, line {number}", DataError), f"{path}, line {number}", folder)
            for number, line in lines
        ]
    if not rows:
        raise DataError(f"{path} has no rows.")
    return rows


@dataclass(frozen=True)
class SplitRows:
    """The rows of one source.

    Attributes:
        train: Rows that are trained on.
        held_out: Rows that are held out.
        weight: Share of the documents, relative to other sources.
    """

    train: list[Row]
    held_out: list[Row]
    weight: float


def read_mixture(mixture: MixtureConfig) -> list[SplitRows]:
    """Read all sources of a phase. Without a file of held-out rows, the hash of a row decides. Raises DataError."""
    sources = []
    for source in mixture.sources:
        rows, held_out = read_rows(Path(source.options["path"])), []
        if (test_path := source.options.get("test_path")) is not None:
            held_out = read_rows(Path(test_path))
        else:
            most = mixture.validation_fraction * (1 << 64)
            is_held = [int.from_bytes(row.digest[:8], "big") < most for row in rows]
            held_out = [row for row, held in zip(rows, is_held, strict=True) if held]
            rows = [row for row, held in zip(rows, is_held, strict=True) if not held]
        if not rows:
            raise DataError(f"{source.options['path']} has no rows to train on; lower validation_fraction.")
        sources.append(SplitRows(rows, held_out, source.weight))
    return sources


class Codes:
    """Codes of the clips of a run, computed once and kept in a folder, also those before an interrupt.

    Args:
        folder: The folder.
        codec: The audio tokenizer.
        fingerprint: Identifies the audio tokenizer; codes of another one are not used.
    """

    def __init__(self, folder: Path, codec: AudioTokenizer, fingerprint: str):
        self._file = folder / "codes.safetensors"
        self._codec, self._fingerprint = codec, fingerprint
        self._by_clip: dict[str, torch.Tensor] = {}
        self._names: dict[Path, str] = {}

    def prepare(self, clips: list[Path], console: Console) -> None:
        """Compute the codes of all clips that have none yet. Raises DataError for a clip that cannot be read."""
        self._by_clip |= self._stored()
        missing = []
        for clip in dict.fromkeys(clips):
            self._names[clip] = _digest_of_file(clip, self._fingerprint)
            if self._names[clip] not in self._by_clip:
                missing.append(clip)
        try:
            for number, clip in enumerate(track(missing, "encoding audio", console=console, disable=not missing), 1):
                self._by_clip[self._names[clip]] = self._encoded(clip)
                if number % _STORED_EVERY == 0:
                    self._store()
        finally:  # an interrupt or a clip that cannot be read keeps the work before it
            if missing:
                self._store()

    def __call__(self, clip: Path) -> torch.Tensor:
        """Return the codes of a prepared clip, int64 [F, Q]."""
        return self._by_clip[self._names[clip]].long()

    def _encoded(self, clip: Path) -> torch.Tensor:
        if clip.suffix == ".npy":
            return _read_codes(clip)
        recording = read_audio(clip, sample_rate=self._codec.config.sample_rate)
        return self._codec.encode(torch.from_numpy(recording.samples_S)).to(device="cpu", dtype=torch.int32)

    def _stored(self) -> dict[str, torch.Tensor]:
        try:
            return load_file(self._file) if self._file.is_file() else {}
        except (SafetensorError, OSError):  # a damaged file: the codes are computed again
            return {}

    def _store(self) -> None:
        try:
            with new_folder_atomic(self._file.parent) as folder:
                save_file({name: codes.contiguous() for name, codes in self._by_clip.items()}, folder / self._file.name)
        except OSError as error:
            raise CheckpointError(f"{self._file} could not be written: {error}.") from error


def _digest_of_file(path: Path, fingerprint: str) -> str:
    with open(require_file(path, DataError), "rb") as file:
        return hashlib.sha256((fingerprint + hashlib.file_digest(file, "sha256").hexdigest()).encode()).hexdigest()


def _read_codes(path: Path) -> torch.Tensor:
    try:
        codes = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is no file of codes ({error}). Write it with numpy.save.") from error
    if not isinstance(codes, np.ndarray) or codes.ndim != 2 or codes.dtype.kind not in "iu" or codes.size > _MOST_CODES:
        raise DataError(f"{path} must hold integers [frames, codebooks].")
    return torch.from_numpy(codes.astype(np.int32))


def _listed(values: Any, where: str) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise DataError(f"{where} must hold a list, not empty.")
    return values


def _document_part(item: Any, codes_of: Callable[[Any], torch.Tensor], where: str) -> Part:
    kind = item.get("type") if isinstance(item, Mapping) else None
    text, audio = (item.get("text"), item.get("audio")) if isinstance(item, Mapping) else (None, None)
    if kind == "text" and isinstance(text, str):
        return TextPart(text, has_loss=True)
    if kind == "audio" and audio is not None:
        return AudioPart(codes_of(audio), has_loss=True)
    if kind == "speech" and isinstance(text, str) and audio is not None:
        return SpeechPart(text, codes_of(audio), has_loss=True)
    raise DataError(f'{where}: an item of content has the type "text", "audio" or "speech", with text, audio or both.')


def _strings(value: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """Yield the strings under some keys, at any depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in keys and isinstance(item, str):
                yield item
            else:
                yield from _strings(item, keys)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, keys)
