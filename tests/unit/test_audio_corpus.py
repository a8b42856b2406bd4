"""The speech corpus: words of prompts, composed sentences, splits, rows, and packages that are not as expected."""

import hashlib
import io
import json
import random
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from openmimo.core import files as corpus_files
from openmimo.core.errors import ConfigError, DataError
from openmimo.data.audio import corpus, debian, words
from openmimo.data.audio.config import CorpusConfig
from openmimo.data.audio.corpus import is_held_out, read_corpus, write_corpus
from openmimo.data.audio.facts import question
from openmimo.data.audio.files import read_audio, write_audio
from openmimo.data.audio.tasks import write_tasks
from openmimo.data.audio.words import compose, spoken_words
from openmimo.engine.audio.engine import speech_request
from openmimo.train.audio.rows import read_rows
from recipes import audio_language

soundfile = pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("soxr", reason="the extra audio is not installed")


def test_every_part_of_a_sentence_is_a_spoken_word():
    spoken = set(spoken_words().values())
    source = random.Random(0)
    assert {part for _ in range(2000) for part in compose(source)} <= spoken
    assert {"seventy", "nineteenth", "december", "x", "zulu", "o'clock", "you have"} <= spoken


def test_numbers_are_said_as_in_english():
    names = spoken_words()
    assert [names[f"digits/{n}"] for n in (0, 7, 13, 40, 90)] == ["zero", "seven", "thirteen", "forty", "ninety"]
    assert [names[f"digits/h-{n}"] for n in (1, 12, 20, 90)] == ["first", "twelfth", "twentieth", "ninetieth"]
    assert (names["digits/day-0"], names["digits/mon-11"]) == ("sunday", "december")
    sentences = {" ".join(compose(random.Random(seed))) for seed in range(400)}
    assert all(text.endswith(" message") == text.startswith("you have one ") for text in sentences if "mess" in text)
    assert " ".join(words._below_thousand(958)) == "nine hundred fifty eight"
    assert [words._below_thousand(value)[-1] for value in (5, 30, 700, 717)] == [
        "five",
        "thirty",
        "hundred",
        "seventeen",
    ]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder with a recording of each word of the prompts, each a tone of its own with silence at both ends."""
    folder = tmp_path_factory.mktemp("recordings") / "sounds"
    for number, name in enumerate(spoken_words()):
        tone = 0.3 * np.sin(2 * np.pi * (300 + 10 * number) * np.arange(2400) / 24_000)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{name}.wav", np.concatenate([np.zeros(1200), tone, np.zeros(1200)]), 24_000)
    (folder / "sentences").mkdir()
    for number in range(9):
        soundfile.write(folder / "sentences" / f"{number}.wav", np.full(240, 0.1), 24_000)
    (folder / "goodbye.txt").write_text("Goodbye then.\n")
    soundfile.write(folder / "long.wav", np.zeros(4 * 24_000), 24_000)
    (folder / "broken.wav").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def written(recordings):
    """The corpus of these recordings."""
    config = CorpusConfig(sounds=str(recordings), composed=20, max_seconds=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files.os, "fsync", lambda descriptor: None)  # 250 files, and a disk that may be slow
        return write_corpus(recordings.parent / "corpus", config, recordings.parent)


def test_a_corpus_has_clips_sentences_splits_and_rows(written):
    assert read_corpus(written.folder).clips == written.clips
    assert len(written.select("train", composed=True)) == 20
    assert len(written.select("heldout", composed=True)) == 1
    assert [name in note for name, note in zip(("broken.wav", "long.wav"), written.notes, strict=True)] == [True, True]
    for clip in written.clips:
        name = clip.audio.removeprefix("clips/own/").removesuffix(".wav")
        held_out = is_held_out(clip.text if clip.is_composed else name, 0.1) and name not in spoken_words()
        assert (clip.split == "heldout") == held_out
    assert [clip.audio for clip in written.select("heldout", composed=False)] == ["clips/own/sentences/8.wav"]
    held_out = {clip.text for clip in written.select("heldout", composed=True)}
    assert not held_out & {clip.text for clip in written.select("train")}
    rows = [json.loads(line) for line in (written.folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(written.select("train", with_text=True))
    transcribe, speak = rows[:2]
    clip = written.select("train", with_text=True)[0]
    assert transcribe[0]["content"][1] == {"type": "audio", "audio": clip.audio}
    assert transcribe[1] == {"role": "assistant", "thinking": False, "content": [{"type": "text", "text": clip.text}]}
    assert [part["type"] for part in speak[1]["content"]] == ["text", "audio"]


@pytest.fixture(scope="module")
def tasks(written):
    """The rows of its tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files.os, "fsync", lambda descriptor: None)
        return write_tasks(written, CorpusConfig(composed=32))


def test_every_recipe_finds_its_rows(written, tasks):
    """The files that the recipes name have rows whose sounds exist, and none is in both splits."""
    for task in ("transcription", "speech", "understanding", "dialogue"):
        source = getattr(audio_language, task)().stages[0].mixture.sources[0].options
        texts = []
        for split, option in (("train", "path"), ("heldout", "test_path")):
            assert source[option] == f"runs/audio/corpus/{task}/{split}.jsonl"
            rows = read_rows(written.folder / task / f"{split}.jsonl")
            assert [row.value for row in rows] == tasks[task][split]
            assert all(path.is_file() for row in rows for path in row.clips())
            for row in rows:
                row.parts(lambda path: torch.zeros(4, 8, dtype=torch.int64))
            texts.append({json.dumps(row.value[-1]["content"][0]) + str(row.value[-2]) for row in rows})
        assert not texts[0] & texts[1]


def test_speech_rows_ask_for_styles_and_voices_as_the_engine_does(written, tasks):
    by_head = {row[0]["role"] + str(row[0]["content"])[:20]: row for row in tasks["speech"]["train"]}
    assert len(by_head) == 3  # as it is, in a voice, in a style
    for row in by_head.values():
        asked, said = row[-2]["content"][0]["text"], row[-1]["content"][0]["text"]
        style = asked.rpartition("(")[2].rstrip(")") if "(" in asked else None
        voice = row[0]["content"][1]["audio"] if isinstance(row[0]["content"], list) and len(row) == 3 else None
        expected = speech_request(said, style, voice)
        expected[-1]["content"] = [{"type": "text", "text": expected[-1]["content"]}]
        assert row[:-1] == expected
    plain = [clip.seconds / len(clip.text.split()) for clip in written.clips if clip.is_composed]
    slow = [
        read_audio(written.folder / "speech" / row[-1]["content"][1]["audio"]).seconds / len(words_said.split())
        for row in tasks["speech"]["train"]
        if "(slowly)" in row[-2]["content"][0]["text"] and (words_said := row[-1]["content"][0]["text"])
    ]
    assert slow and min(slow) > max(plain)


def test_questions_are_answered(tasks):
    numbers = {word: value for value, word in enumerate(words._ONES + words._TEENS)}
    source = random.Random(0)
    for asked in (question(source) for _ in range(200)):
        assert asked.right in asked.options and len(set(asked.options)) == 4
        one, operation, other, *_ = asked.text.split()[:4] + [""]
        if operation in ("plus", "minus"):
            sign = 1 if operation == "plus" else -1
            assert numbers[asked.right] == numbers[one] + sign * numbers[other]
    for task, thinking in (("understanding", False), ("dialogue", None)):
        kinds = [row[-1]["thinking"] for row in tasks[task]["train"]]
        assert kinds == [thinking, thinking, thinking, True] * 2
        assert "Chain-of-thought" in tasks[task]["train"][3][-1]


def test_own_recordings_have_rows_of_two_tasks(tmp_path):
    for name in "abc":
        write_audio(tmp_path / "sounds" / f"{name}.wav", np.zeros(240))
        (tmp_path / "sounds" / f"{name}.txt").write_text(name)
    config = CorpusConfig(sounds=str(tmp_path / "sounds"))
    written = write_tasks(write_corpus(tmp_path / "corpus", config, tmp_path), config)
    assert {task: len(rows["train"]) for task, rows in written.items()} == {"transcription": 2, "speech": 3}


def test_a_composed_sentence_is_its_words_in_order(written):
    hertz = {name.split("/")[-1]: 300 + 10 * number for number, name in enumerate(spoken_words())}
    digits = {word: hertz[name.split("/")[-1]] for name, word in spoken_words().items() if name.startswith("digits/")}
    clip = next(clip for clip in written.clips if clip.is_composed and set(clip.text.split()) <= set(digits))
    samples = read_audio(written.folder / clip.audio).samples_S
    loud = np.convolve(np.abs(samples), np.ones(120) / 120, "same") > 0.02
    edges = np.diff(loud.astype(int))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    assert len(starts) == len(clip.text.split())
    for word, start, end in zip(clip.text.split(), starts, ends, strict=True):
        assert abs(np.argmax(np.abs(np.fft.rfft(samples[start + 200 : end - 200], 24_000))) - digits[word]) < 6, word


def test_transcripts_of_asterisk_are_read(tmp_path):
    for name in ("hello-world", "beep", "digits/at"):
        write_audio(tmp_path / "sounds" / f"{name}.wav", np.zeros(240))
    path = tmp_path / "core-sounds-en.txt"
    path.write_text("; sounds\nhello-world: Hello,  World!\nbeep: [this is a beep]\ndigits/at: at\n")
    config = CorpusConfig(sounds=str(tmp_path / "sounds"), transcripts=str(path))
    texts = {clip.audio: clip.text for clip in write_corpus(tmp_path / "corpus", config, tmp_path).clips}
    assert texts["clips/own/hello-world.wav"] == "hello world"
    assert texts["clips/own/digits/at.wav"] == "at"
    path.write_text("nothing here\n")
    with pytest.raises(DataError, match="has no line of the form"):
        write_corpus(tmp_path / "corpus", config, tmp_path)


def test_folders_without_recordings_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no recordings that end in"):
        write_corpus(tmp_path / "corpus", CorpusConfig(sounds=str(tmp_path / "empty")), tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        write_corpus(tmp_path / "corpus", CorpusConfig(sounds=str(tmp_path / "none")), tmp_path)
    with pytest.raises(DataError, match="clips.jsonl does not exist"):
        read_corpus(tmp_path)
    (tmp_path / "clips.jsonl").write_text('{"audio": "a.wav"}\n')
    with pytest.raises(DataError, match="is no list of clips"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("corpus", ["sounds", "sounds/corpus", "."])
def test_a_corpus_within_its_recordings_is_refused(corpus, tmp_path):
    write_audio(tmp_path / "sounds" / "a.wav", np.zeros(240))
    with pytest.raises(ConfigError, match="lie in one another"):
        write_corpus(tmp_path / corpus, CorpusConfig(sounds=str(tmp_path / "sounds")), tmp_path)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.wav"]


def test_two_recordings_of_one_name_are_refused(tmp_path):
    for ending in ("wav", "flac"):
        write_audio(tmp_path / "sounds" / f"a.{ending}", np.zeros(240))
    with pytest.raises(DataError, match=r"a.flac and .*a.wav have the same name"):
        write_corpus(tmp_path / "corpus", CorpusConfig(sounds=str(tmp_path / "sounds")), tmp_path)
    assert not (tmp_path / "corpus").exists()


def test_a_small_corpus_has_a_held_out_clip_and_a_row(tmp_path):
    names = [name for name in "abcdefgh" if not is_held_out(name, 0.1)][:3]
    for name in names:
        write_audio(tmp_path / "sounds" / f"{name}.wav", np.zeros(240))
    config = CorpusConfig(sounds=str(tmp_path / "sounds"))
    lowest = min(names, key=lambda name: next(share for share in np.linspace(0, 1, 9999) if is_held_out(name, share)))
    clips = write_corpus(tmp_path / "corpus", config, tmp_path).clips
    assert [clip.audio for clip in clips if clip.split == "heldout"] == [f"clips/own/{lowest}.wav"]
    with_text = [name for name in names if name != lowest]
    for name in with_text:
        (tmp_path / "sounds" / f"{name}.txt").write_text(name)
    written = write_corpus(tmp_path / "corpus", config, tmp_path)
    assert [len(written.select(split)) for split in ("train", "heldout")] == [1, 2]
    assert len((tmp_path / "corpus" / "heldout.jsonl").read_text().splitlines()) == 2
    for name in with_text:
        (tmp_path / "sounds" / f"{name}.wav").unlink()
    with pytest.raises(DataError, match="has 1 usable recordings that may be held out"):
        write_corpus(tmp_path / "corpus", config, tmp_path)


def package_of(files: dict[str, bytes]) -> tuple[bytes, debian.Package]:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    deb = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", archive.getvalue())):
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return deb, replace(
        debian.PROMPTS, name="sounds", sha256=hashlib.sha256(deb).hexdigest(), num_bytes=len(deb), folder="usr/share/s"
    )


def test_a_package_of_the_pool_is_checked_and_unpacked(tmp_path, monkeypatch):
    deb, package = package_of({"./usr/share/s/digits/1.g722": b"one", "./usr/share/doc/readme": b"text"})
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    monkeypatch.setattr(debian.urllib.request, "urlopen", lambda address, timeout: io.BytesIO(deb))
    sounds = debian.fetch(package, tmp_path)
    assert (sounds / "digits" / "1.g722").read_bytes() == b"one"
    monkeypatch.setattr(debian.urllib.request, "urlopen", None)
    assert debian.fetch(package, tmp_path) == sounds  # loaded once
    monkeypatch.setattr(debian.urllib.request, "urlopen", lambda address, timeout: io.BytesIO(deb + b"x"))
    with pytest.raises(DataError, match="has the SHA-256 .*; it is not used"):
        debian.fetch(replace(package, name="changed"), tmp_path)
    assert not (tmp_path / "changed").exists()


def test_a_package_cannot_write_outside_its_folder(tmp_path, monkeypatch):
    deb, package = package_of({"../outside": b"bad"})
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    monkeypatch.setattr(debian.urllib.request, "urlopen", lambda address, timeout: io.BytesIO(deb))
    with pytest.raises(DataError, match="cannot be unpacked"):
        debian.fetch(package, tmp_path / "cache")
    assert not (tmp_path / "outside").exists()


def test_wideband_prompts_are_decoded(tmp_path):
    g722 = pytest.importorskip("G722", reason="the extra audio-demo is not installed")
    tone = (8000 * np.sin(2 * np.pi * 600 * np.arange(16_000) / 16_000)).astype(np.int16)
    (tmp_path / "tone.g722").write_bytes(g722.G722(16_000, 64_000).encode(tone.tolist()))
    samples = corpus._read_sound(tmp_path / "tone.g722", 10)
    assert abs(len(samples) - 24_000) <= 3
    spectrum = np.abs(np.fft.rfft(samples[: len(samples) // 2 * 2]))
    assert abs(int(np.argmax(spectrum)) - 600) <= 1
    with pytest.raises(DataError, match="longer than the limit"):
        corpus._read_sound(tmp_path / "tone.g722", 0.5)
