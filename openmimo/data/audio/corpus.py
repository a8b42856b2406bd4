"""A speech corpus from recordings: mono files, a list of clips, and training rows in the format of MiMo-Audio-Training.

    FOLDER/clips.jsonl          one clip a line: audio, text (null: unknown), voice, seconds, split
    FOLDER/{train,heldout}.jsonl  conversations that transcribe a clip, and conversations that speak its text
    FOLDER/clips/VOICE/NAME.wav   recordings of 24 kHz
    FOLDER/composed/NAME.flac     sentences composed of recordings of words
    FOLDER/LICENSES.txt

A clip is held out by a hash of its name, at least one in a corpus, and a composed sentence by a hash of its text. The
recordings of words are never held out, so no part of a held-out recording is in a training sentence, and held-out
sentences are new sequences of known words. Clips of other voices are never trained on.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openmimo.core.errors import ConfigError, DataError
from openmimo.core.files import read_text, write_text_atomic
from openmimo.data.audio.config import CorpusConfig
from openmimo.data.audio.debian import OTHER_VOICES, PROMPTS, fetch
from openmimo.data.audio.files import SAMPLE_RATE, optional_module, read_audio, resample, write_audio
from openmimo.data.audio.words import compose, spoken_words

TRAINING_VOICE = "allison"
TRANSCRIBE = "Transcribe this audio file."
SPEAK = "Please convert this text to speech: "
STYLE = "Generate speech from the text in the style of the instruction."
VOICE = "Your voice should be:"
ENDINGS = (".wav", ".flac", ".ogg", ".mp3", ".g722")

_G722_RATE = 16_000
_NO_SPEECH = ("silence/", "beep", "ascending-2tone", "descending-2tone", "tt-monkeys", "confbridge-join",
              "confbridge-leave")  # fmt: skip
_FULL_SCALE = 32768.0

Split = Literal["train", "heldout", "other"]


@dataclass(frozen=True)
class Clip:
    """One recording or composed sentence of a corpus.

    Attributes:
        audio: Its file, relative to the folder of the corpus.
        text: Its words, in small letters; None if they are not known.
        voice: Name of the speaker.
        seconds: Duration.
        split: train, heldout, or other (another voice, only for tests).
        is_composed: Whether it is composed of recordings of words.
    """

    audio: str
    text: str | None
    voice: str
    seconds: float
    split: Split
    is_composed: bool = False


@dataclass(frozen=True)
class Corpus:
    """A corpus that was written.

    Attributes:
        folder: Its folder.
        clips: Its clips.
        notes: What was left out, and why.
    """

    folder: Path
    clips: tuple[Clip, ...]
    notes: tuple[str, ...] = ()

    def select(self, split: Split, *, composed: bool | None = None, with_text: bool = False) -> list[Clip]:
        """The clips of a split; only composed or only recorded ones, and only those with text, where asked for."""
        return [
            clip
            for clip in self.clips
            if clip.split == split
            and composed in (None, clip.is_composed)
            and (clip.text is not None or not with_text)
        ]  # fmt: skip


def write_corpus(folder: Path, config: CorpusConfig, cache: Path) -> Corpus:
    """Writes a corpus into `folder` and returns it.

    Args:
        folder: The folder; existing files of the same names are replaced.
        config: What it contains.
        cache: A folder for packages, which are loaded only once.

    Raises:
        ConfigError: A package of an extra is not installed, or the corpus and the recordings share a folder.
        DataError: There are fewer than two recordings, two of them have one name, or they cannot be read.
    """
    if config.sounds is None:
        words = spoken_words()
        sounds = [_Sounds(fetch(PROMPTS, cache), TRAINING_VOICE, PROMPTS.license, words, words)]
        sounds += _other_voices(fetch(OTHER_VOICES, cache))
    else:
        own = Path(config.sounds)
        _check_apart(folder, own)
        are_prompts = (own / "digits").is_dir() and (own / "phonetic").is_dir()
        words = spoken_words() if are_prompts else {}
        sounds = [_Sounds(own, "own", "Recordings of your own.", words, words)]
    if config.transcripts is not None:
        sounds[0] = replace(sounds[0], texts=sounds[0].texts | _read_transcripts(Path(config.transcripts)))
    clips: list[Clip] = []
    notes: list[str] = []
    for number, source in enumerate(sounds):
        clips += _write_clips(folder, source, config, notes, is_other=number > 0)
    clips = _with_held_out(clips, sounds[0])
    clips += _write_composed(folder, clips, sounds[0], config)
    if not clips:
        raise DataError(f"{sounds[0].folder} has no recordings that end in {', '.join(ENDINGS)}.")
    corpus = Corpus(folder, tuple(clips), tuple(notes))
    _write_lists(corpus, dict.fromkeys(source.license for source in sounds))
    return corpus


def read_corpus(folder: Path | str) -> Corpus:
    """Reads the list of clips that `write_corpus` wrote. Raises DataError if it is missing or damaged."""
    path = Path(folder) / "clips.jsonl"
    try:
        clips = tuple(Clip(**json.loads(line)) for line in read_text(path, DataError).splitlines())
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is no list of clips ({error}). Write it again with `openmimo audio data`.") from error
    return Corpus(Path(folder), clips)


def is_held_out(text: str, share: float) -> bool:
    """Whether a name or text is held out; the same in every corpus."""
    return _rank(text) < share


def _rank(text: str) -> float:
    """A hash between 0 and 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def transcription(clip: Clip) -> list[dict[str, Any]]:
    """The conversation that transcribes a clip, in the format of MiMo-Audio-Training."""
    return [
        {"role": "user", "content": [{"type": "text", "text": TRANSCRIBE}, {"type": "audio", "audio": clip.audio}]},
        {"role": "assistant", "thinking": False, "content": [{"type": "text", "text": clip.text}]},
    ]


def speech(clip: Clip) -> list[dict[str, Any]]:
    """The conversation that speaks the text of a clip, in the format of MiMo-Audio-Training."""
    return [
        {"role": "user", "content": [{"type": "text", "text": f"{SPEAK}{clip.text}"}]},
        {
            "role": "assistant",
            "thinking": False,
            "content": [{"type": "text", "text": clip.text}, {"type": "audio", "audio": clip.audio}],
        },
    ]


# --- recordings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sounds:
    """A folder of recordings of one voice.

    Attributes:
        folder: The folder.
        voice: Name of the voice.
        license: Who recorded it, and the license.
        texts: What is said in some of the recordings, by path without ending.
        words: Recordings of words of which sentences are composed; not empty for telephone prompts.
    """

    folder: Path
    voice: str
    license: str
    texts: dict[str, str]
    words: dict[str, str] = field(default_factory=dict)


def _other_voices(folder: Path) -> list[_Sounds]:
    """The recordings of PocketSphinx's test data, whose transcripts have lines `<s> words </s> (name)`."""
    found = []
    for voice, name in (("librivox", "librivox/transcription"), ("cards", "cards/cards.transcription")):
        texts = {}
        for line in read_text(folder / name, DataError).splitlines():
            words, _, key = line.rpartition("(")
            texts[key.rstrip(")")] = words.replace("<s>", "").replace("</s>", "").strip()
        found.append(_Sounds(folder / voice, voice, OTHER_VOICES.license, texts))
    return found


def _read_transcripts(path: Path) -> dict[str, str]:
    """Lines `name: words`; lines that start with ";", and descriptions in brackets, have no words."""
    texts = {}
    for line in read_text(path, DataError).splitlines():
        name, colon, words = line.partition(":")
        spoken = "".join(c if c.isalnum() or c == "'" else " " for c in words.lower())
        if colon and not line.startswith(";") and not words.strip().startswith(("[", "(")) and spoken.strip():
            texts[name.strip().removesuffix(".wav")] = " ".join(spoken.split())
    if not texts:
        raise DataError(f'{path} has no line of the form "name: words".')
    return texts


def _write_clips(
    folder: Path, sounds: _Sounds, config: CorpusConfig, notes: list[str], *, is_other: bool
) -> Iterator[Clip]:
    """Writes the recordings of a folder as mono files of 24 kHz."""
    for name, path in _recordings(sounds).items():
        try:
            samples = _read_sound(path, config.max_seconds)
        except DataError as error:
            notes.append(str(error))
            continue
        target = Path("clips") / sounds.voice / f"{name}.wav"
        write_audio(folder / target, samples)
        is_kept = name in sounds.words or not is_held_out(name, config.held_out)
        split: Split = "other" if is_other else ("train" if is_kept else "heldout")
        yield Clip(
            target.as_posix(), _text_of(path, name, sounds), sounds.voice, len(samples) / SAMPLE_RATE, split
        )  # fmt: skip


def _recordings(sounds: _Sounds) -> dict[str, Path]:
    """The recordings of a folder by their name, which is the path without ending."""
    if not sounds.folder.is_dir():
        raise DataError(f"{sounds.folder} is no folder. Give the folder that contains the recordings.")
    found: dict[str, Path] = {}
    for path in sorted(sounds.folder.rglob("*")):
        name = path.relative_to(sounds.folder).with_suffix("").as_posix()
        is_speech = not sounds.words or not name.startswith(_NO_SPEECH)
        if path.suffix.lower() not in ENDINGS or not path.is_file() or not is_speech:
            continue
        if name in found:
            raise DataError(
                f"{found[name]} and {path} have the same name, and the corpus has one file for it. Rename one of them, "
                "or remove it."
            )
        found[name] = path
    return found


def _check_apart(folder: Path, sounds: Path) -> None:
    """Refuses a corpus in the folder of its recordings or around it, which would take its own files as recordings."""
    corpus, own = folder.resolve(), sounds.resolve()
    if corpus.is_relative_to(own) or own.is_relative_to(corpus):
        raise ConfigError(
            f"the corpus {folder} and the recordings {sounds} lie in one another, so that a second call would take "
            "clips of the corpus as recordings. Name a folder outside of it."
        )


def _with_held_out(clips: list[Clip], sounds: _Sounds) -> list[Clip]:
    """The clips with at least one held out, and one with text if two have text: that with the lowest hash."""
    own = [clip for clip in clips if clip.voice == sounds.voice and _name_of(clip) not in sounds.words]
    least = 1 if sounds.words else 2  # recordings of words are always trained on
    for kind in (own, [clip for clip in own if clip.text is not None]):
        if len(kind) >= least and all(clip.split == "train" for clip in kind):
            chosen = min(kind, key=lambda clip: _rank(_name_of(clip)))
            clips = [replace(clip, split="heldout") if clip is chosen else clip for clip in clips]
    if clips and len(own) < least:
        raise DataError(
            f"{sounds.folder} has {len(own)} usable recordings that may be held out, and needs {least}. Add recordings."
        )
    return clips


def _name_of(clip: Clip) -> str:
    """The name of the recording of a clip."""
    return clip.audio.removeprefix(f"clips/{clip.voice}/").removesuffix(".wav")


def _text_of(path: Path, name: str, sounds: _Sounds) -> str | None:
    words_file = path.with_suffix(".txt")
    if name not in sounds.texts and words_file.is_file():
        return " ".join(read_text(words_file, DataError).split()) or None
    return sounds.texts.get(name)


def _read_sound(path: Path, max_seconds: float) -> np.ndarray:
    if path.suffix.lower() != ".g722":
        return read_audio(path, max_seconds=max_seconds).samples_S
    data = path.read_bytes()
    if len(data) > max_seconds * _G722_RATE / 2:
        raise DataError(f"{path} is longer than the limit of {max_seconds:,.0f} seconds (--max-seconds).")
    decoded = optional_module("G722", "audio-demo").G722(_G722_RATE, 64_000).decode(data)
    if not len(decoded):
        raise DataError(f"{path} contains no samples.")
    return resample(np.asarray(decoded, np.float32) / _FULL_SCALE, _G722_RATE, SAMPLE_RATE)


# --- composed sentences ----------------------------------------------------------------------------------------------


def _write_composed(folder: Path, clips: Iterable[Clip], sounds: _Sounds, config: CorpusConfig) -> list[Clip]:
    """Writes sentences composed of the recordings of words: `composed` for training, and a twentieth of it held out.

    None if the recordings are not those of a telephone system, which has all words of the sentences.
    """
    words = _recorded_words(folder, clips, sounds)
    if not set(spoken_words().values()) <= set(words):
        return []
    composed: list[Clip] = []
    source = random.Random(config.seed)
    wanted: dict[Split, int] = {"train": config.composed, "heldout": -(-config.composed // 20)}
    seen: set[str] = set()
    while any(wanted.values()):
        parts = compose(source)
        text = " ".join(parts)
        split: Split = "heldout" if is_held_out(text, config.held_out) else "train"
        if not wanted[split] or (split == "heldout" and text in seen):
            continue
        seen.add(text)
        wanted[split] -= 1
        samples = joined([source.choice(words[part]) for part in parts], source)
        path = Path("composed") / f"{split}-{wanted[split]:05d}.flac"
        write_audio(folder / path, samples)
        composed.append(Clip(path.as_posix(), text, sounds.voice, len(samples) / SAMPLE_RATE, split, is_composed=True))
    return composed


def _recorded_words(folder: Path, clips: Iterable[Clip], sounds: _Sounds) -> dict[str, list[np.ndarray]]:
    """The recordings of each word without silence at both ends."""
    found: dict[str, list[np.ndarray]] = {}
    for clip in clips:
        name = _name_of(clip)
        if clip.voice == sounds.voice and name in sounds.words:
            found.setdefault(sounds.words[name], []).append(trimmed(read_audio(folder / clip.audio).samples_S))
    return found


def trimmed(samples_S: np.ndarray, *, window: int = 240, decibels: float = -40.0) -> np.ndarray:
    """Returns the samples from the first to the last window whose level is above `decibels` below the loudest one."""
    levels = np.sqrt(np.mean(samples_S[: len(samples_S) // window * window].reshape(-1, window) ** 2, axis=1))
    loud = np.flatnonzero(levels > levels.max(initial=0.0) * 10 ** (decibels / 20))
    return samples_S[max(0, loud[0] - 2) * window : (loud[-1] + 3) * window] if len(loud) else samples_S


def joined(
    parts: Sequence[np.ndarray], source: random.Random, pauses: tuple[float, float] = (0.04, 0.16)
) -> np.ndarray:
    """Returns the parts with pauses (in seconds) before them, at a level up to 3 dB above or below the recorded one."""
    gain = np.float32(10 ** (source.uniform(-3, 3) / 20))
    pieces: list[np.ndarray] = []
    for part in parts:
        pieces += [np.zeros(int(source.uniform(*pauses) * SAMPLE_RATE), np.float32), gain * part]
    pieces.append(np.zeros(int(0.08 * SAMPLE_RATE), np.float32))
    return np.concatenate(pieces)


# --- lists -----------------------------------------------------------------------------------------------------------


def _write_lists(corpus: Corpus, licenses: Iterable[str]) -> None:
    write_text_atomic(corpus.folder / "clips.jsonl", "".join(f"{json.dumps(vars(clip))}\n" for clip in corpus.clips))
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        rows = [row(clip) for clip in corpus.select(split, with_text=True) for row in (transcription, speech)]
        write_text_atomic(corpus.folder / f"{split}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    write_text_atomic(corpus.folder / "LICENSES.txt", "\n\n".join(licenses) + "\n")
