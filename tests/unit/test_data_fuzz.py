"""A damaged data file is read, or refused by a DataError that names the file and the line or byte."""

import bz2
import gzip
import json
import os
import re
import warnings
from functools import partial

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmimo.core.errors import ConfigError, DataError
from openmimo.data import compressed
from openmimo.data.config import SourceConfig, TaskConfig
from openmimo.data.objects import read_objects
from openmimo.data.source import SOURCES, SyntheticSource, open_source, read_documents
from openmimo.data.task import FAMILIES, open_task
from openmimo.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["system user assistant and some words\n"] * 20, 300)
TURNS = [{"role": "system", "content": ""}, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
GOOD = {
    "chat": [{"messages": TURNS}, {"messages": [*TURNS, TURNS[1], {**TURNS[2], "reasoning_content": "hm"}]}],
    "jsonl": [{"text": "some text"}, {"text": "other text"}],
    "problems": [{"prompt": "p", "answer": 1}, {"prompt": "q", "answer": "b", "difficulty": 2, "id": "x"}],
}
ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        10**400,
        1.5,
        "",
        "\ud83d",
        "\0",
        [],
        {},
        [None],
        {"a": 1},
        [[]],
        "<|im_end|>",
        "x" * 2000,
        5,
        {"role": 1},
    ]
)


def read(kind, path):
    """Reads everything that a run would read of the file."""
    if kind == "problems":
        task = open_task(TaskConfig("jsonl", 2, 2, options={"path": path}))
        return task.problem_at(0, split="train", seed=0)
    if kind == "chat":
        source, options = open_source(SourceConfig("chat", options={"path": path}))
        maker = source.row_makers(options, TOKENIZER, 100, 0.0).by_split["train"]
        return maker(np.random.default_rng(0))
    return list(read_documents(SourceConfig(kind, options={"path": path})))


def check(kind, path, *, whole_set_may_be_refused=True):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(kind, str(path))
    except DataError as error:
        says = str(error)
        assert path.name in says and "\n" not in says.strip()
        assert (
            re.search(rf"{path.name}, line \d+: ", says)
            or "fits into rows" in says
            or "problem" in says
            or "is compressed" in says
        )
        says.encode()


def mutated(value, data):
    """Returns `value` with one part, at any depth, replaced, removed or renamed."""
    if isinstance(value, (dict, list)) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        change = data.draw(st.sampled_from(["deeper", "deeper", "exchange", "remove", "rename"]))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if change == "deeper":
            copy[key] = mutated(value[key], data)
        elif change == "exchange":
            copy[key] = data.draw(ODD)
        elif change == "remove":
            del copy[key]
        elif isinstance(copy, dict):
            copy[data.draw(st.sampled_from(["x", "", "tool_calls", "tools", "name", "system"]))] = copy.pop(key)
        return copy
    return data.draw(ODD)


@pytest.mark.parametrize("kind", sorted(GOOD))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_lines_of_any_json(kind, tmp_path, data):
    rows = [*GOOD[kind], mutated(GOOD[kind][data.draw(st.integers(0, 1))], data)]
    path = tmp_path / "mutated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(kind, path)


@pytest.mark.parametrize("kind", sorted(GOOD))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes(kind, tmp_path, data):
    content = bytearray("".join(json.dumps(row) + "\n" for row in GOOD[kind]).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(content)
    check(kind, path)


@pytest.mark.parametrize("kind", sorted(GOOD))
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\xff\xfe", "not UTF-8"), (b'{"x": "\xed\xa0\xbd"}', "not UTF-8"),
        (b'{"x": NaN}', "NaN is not a JSON number"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"), (b"[" * 10**5, "not valid JSON"), (b"", ""),
        (b'{"x": "\\ud83d"}', "under 'x'.*lone surrogate"), (b'{"\\udc00": 1}', "a key .*lone surrogate"),
        (b"null", "expected a JSON object"), (b'{"x": "\\ud83d\\ude00"}', ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(kind, tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(GOOD[kind][0]).encode()
    path.write_bytes(good + b"\n\n" + line + b"\n")
    if said:
        with pytest.raises(DataError, match=f"bad.jsonl, line 3: .*{said}"):
            read(kind, str(path))
    else:
        check(kind, path)


@pytest.mark.parametrize("kind", [*sorted(GOOD), "text_folder", "parquet"])
def test_paths_that_cannot_be_read(kind, tmp_path):
    for path, said in {
        "": "empty", str(tmp_path / "nowhere"): "does not exist", "a\0b": "does not exist|cannot be opened",
        "~no_such_user/x": "cannot be opened|does not exist", "x" * 5000: "cannot be opened",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=said):
            read(kind, path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is neither a file nor a folder"):
        read(kind, str(tmp_path / "pipe"))


def test_compressed_files_are_named(tmp_path):
    packed = bz2.compress(b'{"text": "x"}\n')
    (tmp_path / "a.jsonl.bz2").write_bytes(packed)
    with pytest.raises(DataError, match="only compressed files, such as a.jsonl.bz2. Unpack them"):
        read("jsonl", str(tmp_path))
    with pytest.raises(DataError, match="a.jsonl.bz2 is compressed. Unpack it"):
        read("jsonl", str(tmp_path / "a.jsonl.bz2"))
    (tmp_path / "b.jsonl").write_text('{"text": "y"}\n')
    with pytest.warns(UserWarning, match="1 compressed files, such as a.jsonl.bz2, are skipped"):
        assert read("jsonl", str(tmp_path)) == ["y"]
    (tmp_path / "b.jsonl").write_bytes(packed)
    with pytest.raises(DataError, match="b.jsonl is compressed"):
        read("jsonl", str(tmp_path / "b.jsonl"))


ZSTD = partial(pyarrow.compress, codec="zstd", asbytes=True)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", ZSTD)])
@pytest.mark.parametrize("kind", sorted(GOOD))
def test_compressed_lines_are_those_of_the_plain_file(kind, suffix, pack, tmp_path):
    content = "".join(json.dumps(row) + "\n" for row in GOOD[kind]).encode()
    (tmp_path / "plain.jsonl").write_bytes(content)
    (tmp_path / f"packed.json{suffix}").write_bytes(pack(content[:9]) + pack(content[9:]))  # two members
    plain, packed = (read(kind, str(tmp_path / name)) for name in ("plain.jsonl", f"packed.json{suffix}"))
    assert str(plain) == str(packed)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".gz", lambda packed: packed[:-9], "damaged gzip file"),
        (".gz", lambda packed: packed[:-8] + b"12345678", "damaged: CRC check failed"),
        (".gz", lambda packed: b"once upon a time", "not compressed, although its name says so"),
        (".zst", lambda packed: b"once upon a time", "not compressed, although its name says so"),
        (".zst", lambda packed: packed[:-3], "cannot be read: Truncated"),
    ],
)
def test_damaged_compressed_files_are_named(tmp_path, suffix, damage, message):
    packed = gzip.compress(b"a\n" * 99) if suffix == ".gz" else ZSTD(b"a\n" * 99)
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(damage(packed))
    with pytest.raises(DataError, match=f"{re.escape(str(file))} .*{message}"):
        read("text_folder", str(file))


def test_a_compressed_document_has_a_maximum_size(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    assert len(read("text_folder", str(tmp_path / "text.txt.gz"))[0]) == 1 << 20
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(bytes((1 << 20) + 1)))
    (tmp_path / "line.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100_000 + b" " * (1 << 21)))
    for kind, name in (("text_folder", "text.txt.gz"), ("jsonl", "line.jsonl.gz")):
        with pytest.raises(DataError, match="a document of more than 1 MiB"):
            read(kind, str(tmp_path / name))


@pytest.mark.parametrize("kind", ["chat", "problems"])
def test_parquet_rows_are_those_of_json_lines(kind, tmp_path):
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    rows = [row | {"answer": "b"} if "prompt" in row else row for row in GOOD[kind]]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = dict.fromkeys(key for row in rows for key in row)
    pyarrow.parquet.write_table(pyarrow.table({key: [row.get(key) for row in rows] for key in keys}), table)
    assert str(read(kind, str(lines))) == str(read(kind, str(table)))
    with pytest.raises(DataError, match="contains JSON Lines and Parquet files"):
        read(kind, str(tmp_path))


def test_parquet_columns_and_values_without_json_form(tmp_path):
    file = tmp_path / "a.parquet"
    columns = {"prompt": ["x", None], "answer": [1.5, 2.5], "picture": [b"1", b"2"], "many": [[1, None], None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    with pytest.warns(UserWarning, match=r"left out: picture \(binary\)"):
        assert [row for _, row in read_objects(str(file))] == [
            {"prompt": "x", "answer": 1.5, "many": [1, None]},
            {"answer": 2.5},
        ]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x", "y"], "answer": [1.0, float("nan")]}), file)
    with pytest.raises(DataError, match="a.parquet, row 2: nan is not a JSON number"):
        list(read_objects(str(file)))
    file.write_bytes(b"PAR1 and so on")
    with pytest.raises(DataError, match="a.parquet cannot be read after row 0"):
        list(read_objects(str(file)))


def test_a_json_list_names_the_command_that_rewrites_it(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"text": "x"}\n]')
    with pytest.raises(DataError, match=r"jq -c '\.\[\]' .*a\.json > a_lines\.jsonl"):
        read("jsonl", str(tmp_path / "a.json"))


@pytest.mark.parametrize("text", ["null", "3", "[]", '{"a": 1}'])
def test_a_text_that_is_none_is_named(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(f'{{"text": {text}}}\n')
    with pytest.raises(DataError, match=f"a.jsonl, line 1: 'text' is {re.escape(text)}, not text"):
        read("jsonl", str(tmp_path))


WRONG = [None, True, "x", -1, 0, 10**30, 1.5, float("nan"), float("inf"), [], {}, [1], {"a": 1}, ""]


@pytest.mark.parametrize("name", [name for name in SOURCES.names() if isinstance(SOURCES.get(name), SyntheticSource)])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_options_of_sources_are_checked_when_they_are_opened(name, data):
    config_type = SOURCES.get(name).options
    option = data.draw(st.sampled_from(list(config_type.__dataclass_fields__)))
    options = {option: data.draw(st.sampled_from(WRONG))}
    if name == "chat":
        options = {"path": "/nowhere", **options}
    try:
        source, opened = open_source(SourceConfig(name, options=options))
        source.row_makers(opened, TOKENIZER, 200, 0.1)
    except (ConfigError, DataError) as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", [name for name in FAMILIES.names() if name not in ("jsonl", "reasoning_gym")])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_options_of_tasks_are_checked_when_they_are_opened(name, data):
    family = FAMILIES.get(name)
    names = list(family.options.__dataclass_fields__)
    options = {data.draw(st.sampled_from(names)): data.draw(st.sampled_from(WRONG))} if names else {}
    level = family.difficulties[0]
    try:
        open_task(TaskConfig(name, level, level, options=options)).problem_at(0, split="train", seed=0)
    except (ConfigError, DataError) as error:
        assert "\n" not in str(error)
