"""Training rows of four tasks, made from a corpus, in the format of MiMo-Audio-Training.

    CORPUS/TASK/{train,heldout}.jsonl   conversations
    CORPUS/TASK/sounds/NAME.flac        sentences composed of recordings of words

transcription  sound in, its text out: the clips of the corpus with text
speech         text in, sound out: the clips, those in the voice of a recording, and sentences in a style
understanding  a spoken question with four options in, the right option as text out; every fourth row has thoughts
dialogue       a spoken question in, a spoken answer out; every fourth row has thoughts

Styles, questions and answers need the recorded words of the telephone prompts. Without them, `speech` has only the
clips, and the last two tasks have no rows. A sentence or question is held out by a hash of its words.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmimo.core.files import write_text_atomic
from openmimo.data.audio.config import CorpusConfig
from openmimo.data.audio.corpus import (
    STYLE,
    VOICE,
    Clip,
    Corpus,
    Split,
    is_held_out,
    joined,
    speech,
    transcription,
    trimmed,
)
from openmimo.data.audio.facts import question
from openmimo.data.audio.files import read_audio, write_audio
from openmimo.data.audio.words import compose, spoken_words

_PAUSES = (0.04, 0.16)
_STYLES = {"slowly": ((0.35, 0.6), 1.0), "loudly": (_PAUSES, 1.8), "quietly": (_PAUSES, 0.25)}
_SHARE = 4  # composed sentences of the corpus for one sentence of a task
_THINKS_EVERY = 4
_VOICE_EVERY = 4
_VOICE_SECONDS = 5.0
_TRIES = 100  # draws of a sentence before a split stays smaller

Row = list[dict[str, Any]]
Rows = dict[Split, list[Row]]


def write_tasks(corpus: Corpus, config: CorpusConfig) -> dict[str, Rows]:
    """Writes the rows of the tasks into the folder of a corpus.

    Args:
        corpus: The corpus.
        config: Its settings: the number of sentences follows from `composed`.

    Returns:
        The rows by task and split; tasks without rows are left out.
    """
    speaker = _Speaker(corpus.folder, _recorded_words(corpus), random.Random(f"tasks {config.seed}"))
    tasks: dict[str, Rows] = {"transcription": _of_clips(corpus, transcription), "speech": _of_clips(corpus, speech)}
    for split, rows in tasks["speech"].items():
        tasks["speech"][split] = rows + [
            [_voice_of(corpus, speaker.source), *row] for row in rows[::_VOICE_EVERY]
        ]  # fmt: skip
    if set(spoken_words().values()) <= set(speaker.words):
        for split, rows in _drawn(speaker, config, _styled).items():
            tasks["speech"][split] += rows
        tasks["understanding"] = _drawn(speaker, config, _understood)
        tasks["dialogue"] = _drawn(speaker, config, _answered)
    tasks = {task: rows for task, rows in tasks.items() if rows["train"]}
    for task, by_split in tasks.items():
        for split, rows in by_split.items():
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            write_text_atomic(corpus.folder / task / f"{split}.jsonl", lines)
    return tasks


@dataclass(frozen=True)
class _Speaker:
    """Says sentences with recordings of words.

    Attributes:
        folder: The folder of the corpus.
        words: Recordings by word or phrase.
        source: Chooses recordings and pauses.
    """

    folder: Path
    words: dict[str, list[np.ndarray]]
    source: random.Random

    def say(
        self, parts: list[str], task: str, name: str, *, pauses: tuple[float, float] = _PAUSES, gain: float = 1.0
    ) -> str:
        """Writes a sentence, and returns its path from the rows of the task."""
        samples = joined([self.source.choice(self.words[part]) for part in parts], self.source, pauses)
        write_audio(self.folder / task / "sounds" / f"{name}.flac", np.float32(gain) * samples)
        return f"sounds/{name}.flac"


def _recorded_words(corpus: Corpus) -> dict[str, list[np.ndarray]]:
    """The recordings of the words of the prompts, without silence at both ends."""
    wanted, found = set(spoken_words().values()), dict[str, list[np.ndarray]]()
    for clip in corpus.select("train", composed=False, with_text=True):
        if clip.text in wanted:
            found.setdefault(clip.text, []).append(trimmed(read_audio(corpus.folder / clip.audio).samples_S))
    return found


def _of_clips(corpus: Corpus, row_of: Callable[[Clip], Row]) -> Rows:
    splits: tuple[Split, ...] = ("train", "heldout")
    return {split: [_moved(row_of(clip)) for clip in corpus.select(split, with_text=True)] for split in splits}


def _moved(row: Row) -> Row:
    """A row of the corpus for a file in a folder of it."""
    for message in row:
        for item in message["content"]:
            if item["type"] == "audio":
                item["audio"] = f"../{item['audio']}"
    return row


def _voice_of(corpus: Corpus, source: random.Random) -> dict[str, Any]:
    """A message that asks for the voice of a recording."""
    clips = sorted(corpus.select("train", composed=False), key=lambda clip: clip.seconds)
    clip = source.choice([clip for clip in clips if clip.seconds <= _VOICE_SECONDS] or clips[:1])
    content = [{"type": "text", "text": VOICE}, {"type": "audio", "audio": f"../{clip.audio}"}]
    return {"role": "system", "content": content}


@dataclass(frozen=True)
class _Sentence:
    """What a row is made of.

    Attributes:
        text: Its words, by which it is held out.
        row: Makes the row; takes the name of its sounds and its number.
    """

    text: str
    row: Callable[[str, int], Row]


def _drawn(speaker: _Speaker, config: CorpusConfig, draw: Callable[[_Speaker], _Sentence]) -> Rows:
    """Rows of sentences that are drawn: a share of the composed ones for training, and a twentieth of it held out."""
    train = -(-config.composed // _SHARE)
    wanted: dict[Split, int] = {"train": train, "heldout": -(-train // 20)}
    rows: Rows = {split: [] for split in wanted}
    for _ in range(_TRIES * train):
        if all(len(rows[split]) == count for split, count in wanted.items()):
            break
        sentence = draw(speaker)
        split: Split = "heldout" if is_held_out(sentence.text, config.held_out) else "train"
        number = len(rows[split])
        if number < wanted[split]:
            rows[split].append(sentence.row(f"{split}-{number:05d}", number))
    return rows


def _styled(speaker: _Speaker) -> _Sentence:
    """A sentence in a style, asked for as `AudioEngine.speak` asks for it."""
    parts, style = compose(speaker.source), speaker.source.choice(sorted(_STYLES))
    pauses, gain = _STYLES[style]
    text = " ".join(parts)

    def row(name: str, number: int) -> Row:
        sound = speaker.say(parts, "speech", name, pauses=pauses, gain=gain)
        request, reply = speech(Clip(sound, text, "", 0.0, "train"))
        request["content"][0]["text"] += f"({style})"
        return [{"role": "system", "content": STYLE}, request, reply]

    return _Sentence(text, row)


def _understood(speaker: _Speaker) -> _Sentence:
    """A spoken question with options, and the right option as text."""
    asked = question(speaker.source)

    def row(name: str, number: int) -> Row:
        sound = speaker.say(asked.spoken.split(), "understanding", name)
        answer = _reply(number, asked.spoken, thinks_else=False) | {"content": [{"type": "text", "text": asked.right}]}
        return [{"role": "user", "content": [{"type": "audio", "audio": sound}]}, answer]

    return _Sentence(asked.spoken, row)


def _answered(speaker: _Speaker) -> _Sentence:
    """A spoken question without options, and its spoken answer."""
    asked = question(speaker.source)

    def row(name: str, number: int) -> Row:
        sound = speaker.say(asked.text.split(), "dialogue", f"{name}-question")
        said = speaker.say([asked.right], "dialogue", f"{name}-answer")
        content = [{"type": "text", "text": asked.right}, {"type": "audio", "audio": said}]
        answer = _reply(number, asked.text, thinks_else=None) | {"content": content}
        return [{"role": "user", "content": [{"type": "audio", "audio": sound}]}, answer]

    return _Sentence(asked.text, row)


def _reply(number: int, heard: str, *, thinks_else: bool | None) -> dict[str, Any]:
    """The head of the assistant's message: every fourth one thinks of the words that it heard."""
    if number % _THINKS_EVERY == _THINKS_EVERY - 1:
        return {"role": "assistant", "thinking": True, "Chain-of-thought": f"I hear: {heard}\n"}
    return {"role": "assistant", "thinking": thinks_else}
