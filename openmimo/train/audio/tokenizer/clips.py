"""Segments of the clips of a corpus. B segments, S samples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from openmimo.core.errors import DataError
from openmimo.data.audio.corpus import Split, read_corpus
from openmimo.data.audio.files import read_audio


class Clip(NamedTuple):
    """A clip that can be read.

    Attributes:
        name: Its name, for messages.
        text: Its transcript (None: unknown).
        read: Returns its samples, float32 [S].
    """

    name: str
    text: str | None
    read: Callable[[], torch.Tensor]


class Segments(NamedTuple):
    """Equally long segments.

    Attributes:
        waveform_BS: Float32 samples.
        texts: The transcript of each segment; None if it is unknown or the segment is only a part of its clip.
    """

    waveform_BS: torch.Tensor
    texts: list[str | None]


def open_clips(folder: str, split: Split, sample_rate: int) -> list[Clip]:
    """Return the clips of one split of a corpus. They are read when they are used.

    Composed sentences repeat recorded words. There are at most as many of them as recordings in training, and none
    among held-out clips.

    Raises:
        DataError: There is no corpus, or the split has no clips.
    """
    corpus = read_corpus(folder)
    selected = corpus.select(split, composed=False)
    if split != "heldout":
        composed = corpus.select(split, composed=True)
        selected += composed[:: max(1, -(-len(composed) // max(1, len(selected))))]
    clips = [Clip(clip.audio, clip.text, _reader(corpus.folder / clip.audio, sample_rate)) for clip in selected]
    if not clips:
        raise DataError(f"the corpus {folder} has no clips of the split {split!r}; write it again.")
    return clips


def _reader(path: Path, sample_rate: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.from_numpy(read_audio(path, sample_rate=sample_rate).samples_S)


def random_segments(clips: Sequence[Clip], count: int, samples: int, generator: torch.Generator) -> Segments:
    """Return segments of random clips: a random part of a longer clip, or a shorter one in silence."""
    chosen = torch.randint(len(clips), (count,), generator=generator).tolist()
    return _segments([clips[index] for index in chosen], samples, generator)


def fixed_segments(clips: Sequence[Clip], count: int, samples: int) -> Segments:
    """Return the same segments in every call, evenly spread over the clips."""
    generator = torch.Generator().manual_seed(0)
    count = min(count, len(clips))
    return _segments([clips[index * len(clips) // count] for index in range(count)], samples, generator)


def _segments(clips: Sequence[Clip], samples: int, generator: torch.Generator) -> Segments:
    waveform_BS = torch.zeros(len(clips), samples)
    texts: list[str | None] = []
    for row, clip in zip(waveform_BS, clips, strict=True):
        waveform = clip.read()
        room = samples - len(waveform)
        start = int(torch.randint(abs(room) + 1, (1,), generator=generator))
        if room >= 0:
            row[start : start + len(waveform)] = waveform
        else:
            row.copy_(waveform[start : start + samples])
        texts.append(clip.text if room >= 0 else None)
    return Segments(waveform_BS, texts)
