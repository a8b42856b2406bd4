"""Damage to a checkpoint folder, drawn by hypothesis: one file of a sound folder is changed, cut or replaced.

`save_sound_checkpoint` writes the folder, `damages(folder)` draws, `apply` makes a damaged copy.
"""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conftest import randomize, tiny_config
from hypothesis import strategies as st

from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo

JSON_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json",
)  # fmt: skip
ODD_VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -5.0, 1e30, 10**9, 10**12, 2**60, -(2**63), 10**40, float("nan"),
    float("inf"), "", "false", "x", "1", "full", "\ud800", "../../etc/passwd", "/etc/passwd", [], [0], [[]],
    ["x", None], [1.5] * 3, {}, {"type": "x"}, {"content": 5},
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """One changed file.

    Attributes:
        content: its new bytes; None puts a pipe in its place.
        what: a description for messages.
    """

    file: str
    what: str
    content: bytes | None


def save_sound_checkpoint(folder: Path) -> Path:
    """Saves a checkpoint of two layers in three shards, with every file that a published one has."""
    tokenizer = Tokenizer.train(["The quick brown fox jumps over the lazy dog, 0123456789.\n"], vocab_size=300)
    config = replace(tiny_config(num_layers=2, mtp_heads=1), vocab_size=tokenizer.vocab_size)
    ids = {"bos_token_id": None, "eos_token_id": list(tokenizer.eos_token_ids), "pad_token_id": tokenizer.pad_id}
    model = randomize(MiMo(replace(config, token_ids=ids)), 0)
    save_model(model, folder, tokenizer=tokenizer, max_shard_bytes=200_000)
    generation = {"eos_token_id": list(tokenizer.eos_token_ids), "temperature": 0.3, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def damages(folder: Path) -> st.SearchStrategy[Damage]:
    """Draws the damage of one file of `folder`."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    return st.one_of(
        st.sampled_from(JSON_FILES).flatmap(lambda file: _json_damage(folder, file)),
        st.just("config.json").flatmap(lambda file: _json_damage(folder, file)),
        st.sampled_from(shards).flatmap(lambda file: _header_damage(folder, file)),
        st.sampled_from((*JSON_FILES, *shards)).flatmap(lambda file: _byte_damage(folder, file)),
        st.sampled_from((*JSON_FILES, *shards)).map(lambda file: Damage(file, "a pipe", None)),
    )


def apply(damage: Damage, sound: Path, target: Path) -> Path:
    """Copies `sound` to `target`, which is replaced, and damages one file."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in sound.iterdir():
        if path.name != damage.file:
            os.link(path, target / path.name)
    if damage.content is None:
        os.mkfifo(target / damage.file)
    else:
        (target / damage.file).write_bytes(damage.content)
    return target


@st.composite
def _json_damage(draw: st.DrawFn, folder: Path, file: str) -> Damage:
    values = json.loads((folder / file).read_text())
    what = _change_somewhere(draw, values)
    return Damage(file, what, json.dumps(values).encode())


@st.composite
def _header_damage(draw: st.DrawFn, folder: Path, file: str) -> Damage:
    data = (folder / file).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    what = _change_somewhere(draw, header)
    text = json.dumps(header).encode()
    stated = draw(st.sampled_from((len(text), len(text), len(text), 0, 2**40, 2**64 - 1, len(text) + 1)))
    return Damage(file, f"{what}, header length {stated}", stated.to_bytes(8, "little") + text + data[8 + length :])


@st.composite
def _byte_damage(draw: st.DrawFn, folder: Path, file: str) -> Damage:
    data = (folder / file).read_bytes()
    at = draw(st.integers(0, len(data) - 1))
    piece = draw(st.sampled_from((b"", b"\0", b"\xff\xfe", b'"', b"[" * 100_000, b"9" * 5000)))
    cut = draw(st.booleans())
    return Damage(file, f"{piece[:4]!r} at {at}, cut {cut}", data[:at] + piece + (b"" if cut else data[at + 1 :]))


def _change_somewhere(draw: st.DrawFn, values: Any) -> str:
    """Replaces, removes or adds one entry, at most four levels deep. Returns a description."""
    place, path = values, []
    for _ in range(draw(st.integers(1, 4))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        path.append(key)
        if not isinstance(place[key], (dict, list)) or not place[key]:
            break
        parent, place = place, place[key]
    else:
        place = parent
    if not path:
        return "nothing"
    action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
    value = draw(st.sampled_from(ODD_VALUES))
    if action == "replace":
        place[path[-1]] = value
    elif action == "remove":
        del place[path[-1]]
    elif isinstance(place, dict):
        place[f"{path[-1]}s"] = value
    else:
        place.append(value)
    return f"{action} {path} {value!r}"
