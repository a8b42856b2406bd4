"""Texts in pieces and orders in constant memory: ids and order are those of a plain computation."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmimo.core.errors import DataError
from openmimo.data.config import SourceConfig
from openmimo.data.mixing import StoreRows, permuted
from openmimo.data.source import read_documents, read_text
from openmimo.data.store import TokenStore
from openmimo.data.tokenizer import Tokenizer, cut_text, utf8_length

SOURCE = [read_text(file) for file in sorted(Path(json.__file__).parent.glob("*.py"))]
TOKENIZER = Tokenizer.train(SOURCE, 600)
ALPHABET = "ab 1\n\r\t.,'(é\u0301日。\u00a0\u2028"


@pytest.mark.parametrize("size", [300, 1000])
def test_ids_of_pieces_are_those_of_the_whole(size):
    for text in SOURCE:
        pieces = list(cut_text(text, size))
        assert "".join(pieces) == text and max(map(len, pieces)) <= size and len(pieces) > 1
        assert sum(TOKENIZER.encode_batch(pieces), []) == TOKENIZER.encode(text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=ALPHABET, max_size=200).map(lambda text: "x y\nz " + text + " x\ny z"))
def test_a_cut_at_a_line_end_or_a_blank_changes_no_id(text):
    """Cuts at every preferred position, one by one, in texts with all kinds of blanks and accents."""
    for place in range(1, len(text)):
        before, after = text[place - 1], text[place : place + 2]
        at_line_end = text[:place].endswith("\n") and not text[: place - 1].rstrip("\r")[-1:].isspace() and place > 1
        at_blank = after[:1] == " " and not before.isspace() and not after[1:].isspace() and len(after) == 2
        if (at_line_end and not after[:1].isspace()) or at_blank:
            if not text[: place - 1].rstrip("\r"):
                continue
            pieces = [text[:place], text[place:]]
            assert sum(TOKENIZER.encode_batch(pieces), []) == TOKENIZER.encode(text)


@given(text=st.text(), size=st.integers(2, 50))
def test_pieces_are_the_text_and_never_too_long(text, size):
    pieces = list(cut_text(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)
    assert utf8_length("é" + text.encode(errors="ignore").decode()) == len(("é" + text).encode(errors="ignore"))


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_number_once(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_permutations_are_even():
    counts = np.zeros((10, 10))
    for key in range(4000):
        for index in range(10):
            counts[index, permuted(index, 10, key)] += 1
    assert counts.min() > 330 and counts.max() < 470


def test_the_order_of_a_large_store_takes_no_memory():
    tokens = np.lib.stride_tricks.as_strided(np.zeros(1, dtype=np.uint16), shape=(2**36,), strides=(0,))
    store = TokenStore(tokens, np.array([0, 2**36]), text_bytes=0, content="")
    tracemalloc.start()
    rows = StoreRows(store, 32, seed=(0,))
    assert all(len(rows.row(index).token_ids) == 32 for index in (0, 10**6, 2**31, 2**33))
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


_MEASURE = """
import resource, sys
from openmimo.data.config import SourceConfig
from openmimo.data.store import open_store
from openmimo.data.tokenizer import Tokenizer
tokenizer = Tokenizer.train(["the quick brown fox\\n"] * 10, 300)
tokenizer.encode_batch(["a"])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
open_store(SourceConfig("jsonl", options={"path": sys.argv[1]}), tokenizer, validation_fraction=0.1)
print(peak() - before)
"""


@pytest.mark.parametrize("megabytes", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_a_long_document_takes_little_memory(tmp_path, monkeypatch, megabytes):
    """Without pieces, 5 MB took 800 MB, and 60 MB took 9.7 GB."""
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path / "cache"))
    line = "the quick brown fox jumps over the lazy dog\n"
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": line * (megabytes * 10**6 // len(line))}))
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "one.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) < (150 if megabytes == 5 else 300)


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_parquet_columns_of_text_of_any_kind(tmp_path, kind):
    texts = ["one", None, "two", "one"]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts).cast(kind)}), tmp_path / "a.parquet")
    config = SourceConfig("parquet", options={"path": str(tmp_path)})
    assert list(read_documents(config)) == ["one", "two", "one"]


def test_parquet_string_views(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["one", "two"]).cast(pyarrow.string_view())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_documents(SourceConfig("parquet", options={"path": str(tmp_path)}))) == ["one", "two"]


def test_damaged_parquet_names_file_and_row(tmp_path):
    texts = [f"text number {number} " * 20 for number in range(3000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet cannot be read after row \d+"):
        list(read_documents(SourceConfig("parquet", options={"path": str(path)})))
