"""The loader: rows of documents in a fixed order, resumable and reshardable; and the needle task."""

import json

import numpy as np
import pytest

from openmimo.core.errors import CheckpointError, ConfigError, DataError
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.data.loader import Batch, Loader, prepare_mixture
from openmimo.data.mixing import ROWS_PER_BLOCK, MixtureSchedule, StoreRows
from openmimo.data.source import split_of, training_documents
from openmimo.data.store import TokenStore, open_store
from openmimo.data.tasks._needles import make_needle, needle_symbols
from openmimo.data.tokenizer import Tokenizer

SEQUENCE_LENGTH = 48
DOCUMENTS = [f"Document {number}: " + "words and more words " * (number % 7) for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(DOCUMENTS, vocab_size=290)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPENMIMO_CACHE", str(folder))
    return folder


@pytest.fixture
def mixture(text_file) -> MixtureConfig:
    needles = {"min_length": 24, "num_pairs": 2, "loss": "answers"}
    return MixtureConfig(
        sources=(
            SourceConfig("jsonl", weight=3.0, options={"path": str(text_file)}),
            SourceConfig("needles", weight=1.0, options=needles),
        ),
        validation_fraction=0.2,
    )


@pytest.fixture
def text_only(mixture) -> MixtureConfig:
    return MixtureConfig(sources=mixture.sources[:1], validation_fraction=mixture.validation_fraction)


@pytest.fixture
def open_loader(mixture, tokenizer):
    def build(**changes) -> Loader:
        return Loader(
            **{"mixture": mixture, "tokenizer": tokenizer, "sequence_length": SEQUENCE_LENGTH, "seed": 5} | changes
        )

    return build


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.token_ids.reshape(-1, SEQUENCE_LENGTH).tolist()]


def assert_same(first: Batch, second: Batch) -> None:
    assert np.array_equal(first.token_ids, second.token_ids)
    assert np.array_equal(first.loss_mask, second.loss_mask)
    assert (first.document_lengths, first.source_rows) == (second.document_lengths, second.source_rows)


def make_store(lengths: list[int]) -> TokenStore:
    """A store in which token i has the value i."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenStore(np.arange(offsets[-1], dtype=np.uint16), offsets, text_bytes=0, content="")


def test_batch_has_the_promised_shapes(open_loader):
    batch = open_loader().next_batch(8)
    assert batch.token_ids.dtype == np.int32 and batch.token_ids.shape == (8 * SEQUENCE_LENGTH,)
    assert batch.loss_mask.dtype == bool and batch.loss_mask.shape == batch.token_ids.shape
    assert sum(batch.source_rows.values()) == 8 and set(batch.source_rows) == {"jsonl", "needles"}
    ends = np.cumsum(batch.document_lengths)
    assert set(np.arange(1, 9) * SEQUENCE_LENGTH) <= set(ends.tolist())


def test_pieces_of_a_text_row_end_where_documents_end(open_loader, text_only, tokenizer):
    batch = open_loader(mixture=text_only).next_batch(50)
    assert batch.loss_mask is None
    ends = np.cumsum(batch.document_lengths) - 1
    row_ends = np.arange(1, 51) * SEQUENCE_LENGTH - 1
    document_ends = np.flatnonzero(batch.token_ids == tokenizer.end_of_text_id)
    assert set(ends.tolist()) == set(document_ends.tolist()) | set(row_ends.tolist())


def test_store_holds_the_training_documents_in_order(tokenizer, text_only):
    store = open_store(text_only.sources[0], tokenizer, validation_fraction=0.2)["train"]
    texts = [tokenizer.decode(store.token_ids[a:b]) for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    assert texts == list(training_documents(text_only.sources[0], 0.2))


def test_an_epoch_sees_every_token_once_and_epochs_differ():
    rows = StoreRows(make_store([100, 3, 7, 80, 50]), 16, seed=(1,))
    for epoch in range(3):
        seen = np.concatenate([rows.row(epoch * 15 + place).token_ids for place in range(15)])
        assert len(set(seen.tolist())) == 240
    first, second = ([rows.row(epoch * 15 + i).token_ids.tolist() for i in range(15)] for epoch in (0, 1))
    assert first != second


def test_window_borders_are_those_of_the_documents():
    lengths = [5, 1, 30, 2, 2, 9]
    store = make_store(lengths)
    starts = set(np.concatenate([[0], np.cumsum(lengths)])[:-1].tolist())
    rows = StoreRows(store, 11, seed=(3,))
    for index in range(100):
        row = rows.row(index)
        assert sum(row.document_lengths) == 11
        borders = np.cumsum(row.document_lengths)[:-1]
        inside = [place for place in range(1, 11) if int(row.token_ids[place]) in starts]
        assert borders.tolist() == inside
        assert np.all(np.diff(row.token_ids) % len(store.token_ids) == 1)


def test_held_out_documents_are_never_trained_on(open_loader, text_only, tokenizer):
    stores = open_store(text_only.sources[0], tokenizer, validation_fraction=0.2)
    trained, held_out = (
        {tokenizer.decode(s.token_ids[a:b]) for a, b in zip(s.offsets, s.offsets[1:], strict=False)}
        for s in (stores["train"], stores["validation"])
    )
    assert trained | held_out == set(DOCUMENTS) and not trained & held_out
    assert 0.1 < len(held_out) / len(DOCUMENTS) < 0.3
    assert all(split_of(text, 0.2) == "validation" for text in held_out)
    assert {text for text in held_out if split_of(text, 0.1) == "validation"} < held_out


def test_next_rows_depend_on_seed_and_stage_only(open_loader):
    reference = open_loader().next_batch(40)
    assert_same(open_loader().next_batch(40), reference)
    parts = open_loader()
    assert sum((rows_of(parts.next_batch(size)) for size in (1, 9, 30)), []) == rows_of(reference)
    for change in ({"seed": 6}, {"stage": 1}):
        assert rows_of(open_loader(**change).next_batch(40)) != rows_of(reference)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(open_loader, num_workers):
    plain = open_loader()
    with open_loader(num_workers=num_workers) as threaded:
        for size in (4, 4, 7, 1, 30):
            assert_same(threaded.next_batch(size), plain.next_batch(size))
        threaded.load_state(open_loader().state())
        assert_same(threaded.next_batch(5), open_loader().next_batch(5))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_goes_on_where_it_stopped(open_loader, num_workers):
    whole = open_loader()
    whole.next_batch(13)
    state = json.loads(json.dumps(whole.state()))
    with open_loader(num_workers=num_workers) as resumed:
        resumed.next_batch(2)
        resumed.load_state(state)
        assert resumed.rows_consumed == 13
        for _ in range(3):
            assert_same(resumed.next_batch(6), whole.next_batch(6))


def test_ranks_share_the_rows_and_can_change_in_number(open_loader):
    whole = open_loader()
    ranks = [open_loader(rank=rank, world_size=3) for rank in range(3)]
    rows = [rows_of(loader.next_batch(4)) for loader in ranks]
    assert [rows[i % 3][i // 3] for i in range(12)] == rows_of(whole.next_batch(12))
    states = [loader.state() for loader in ranks]
    assert states[0] == states[1] == states[2] == whole.state()
    two = [open_loader(rank=rank, world_size=2) for rank in range(2)]
    for loader in two:
        loader.load_state(states[0])
    rows = [rows_of(loader.next_batch(5)) for loader in two]
    assert [rows[i % 2][i // 2] for i in range(10)] == rows_of(whole.next_batch(10))


def test_state_of_other_rows_is_refused_by_name(open_loader, mixture, text_file, tmp_path):
    state = open_loader().state()
    other_weight = MixtureConfig((SourceConfig("jsonl", 2.0, {"path": str(text_file)}), mixture.sources[1]), 0.2)
    for named, change in {
        "seed": {"seed": 6},
        "stage": {"stage": 1},
        "sequence_length": {"sequence_length": 49},
        "tokenizer": {"tokenizer": Tokenizer.train(DOCUMENTS, vocab_size=270)},
        "weight": {"mixture": other_weight},
    }.items():
        with pytest.raises(CheckpointError, match=f"loader state has {named} "):
            open_loader(**change).load_state(state)
    moved = tmp_path / "moved.jsonl"
    moved.write_text(text_file.read_text())
    same_data = MixtureConfig((SourceConfig("jsonl", 3.0, {"path": str(moved)}), mixture.sources[1]), 0.2)
    open_loader(mixture=same_data).load_state(state)
    moved.write_text(text_file.read_text().replace("Document 7:", "Document VII:"))
    changed = (
        r"data of source 'jsonl' \(.*moved.jsonl\) has changed: .*[0-9a-f]{12}, read as .*texts.jsonl.*[0-9a-f]{12}"
    )
    with pytest.raises(CheckpointError, match=changed):
        open_loader(mixture=same_data).load_state(state)


def test_fixed_batches_are_fixed_and_held_out(open_loader, text_only, tokenizer):
    loader = open_loader(mixture=text_only)
    first = list(loader.fixed_batches(2, 3))
    loader.next_batch(5)
    for again, before in zip(loader.fixed_batches(2, 3), first, strict=True):
        assert_same(again, before)
    for other, before in zip(open_loader(mixture=text_only, seed=9, stage=2).fixed_batches(2, 3), first, strict=True):
        assert_same(other, before)
    held_out = [text + "<|endoftext|>" for text in DOCUMENTS if split_of(text, 0.2) == "validation"]
    ends = np.cumsum(first[0].document_lengths)
    for piece in np.split(first[0].token_ids, ends[:-1]):
        text = tokenizer.decode(piece, skip_special=False)
        assert any(text in document for document in held_out)
        if text.startswith("Document") and text.endswith("<|endoftext|>"):
            assert text in held_out


def test_fixed_batches_are_the_same_on_every_rank(open_loader):
    whole = [rows_of(batch) for batch in open_loader().fixed_batches(4, 2)]
    for rank in range(2):
        assert [rows_of(batch) for batch in open_loader(rank=rank, world_size=2).fixed_batches(4, 2)] == whole


def test_sources_come_by_their_weights(open_loader):
    schedule = MixtureSchedule(["a", "b", "c"], [6.0, 3.0, 1.0], seed=(0,))
    places = [schedule.locate(index) for index in range(3 * ROWS_PER_BLOCK)]
    for source, share in enumerate((0.6, 0.3, 0.1)):
        indices = [rank for found, rank in places if found == source]
        assert sorted(indices) == list(range(round(3 * ROWS_PER_BLOCK * share)))
        for start in range(0, 3 * ROWS_PER_BLOCK, 100):
            assert abs(sum(found == source for found, _ in places[start : start + 100]) - 100 * share) <= 2
    assert [schedule.locate(index) for index in (2500, 17)] == [places[2500], places[17]]
    assert open_loader().next_batch(ROWS_PER_BLOCK).source_rows == {"jsonl": 750, "needles": 250}


def test_a_source_without_rows_is_refused():
    with pytest.raises(ConfigError, match="'b'"):
        MixtureSchedule(["a", "b"], [1.0, 1e-4], seed=(0,))


def test_stores_are_made_once_and_again_when_the_text_changes(mixture, tokenizer, text_file, cache):
    prepare_mixture(mixture, tokenizer, sequence_length=SEQUENCE_LENGTH, with_validation=True)
    folders = list((cache / "tokens").iterdir())
    assert len(folders) == 1 and folders[0].name.startswith("jsonl-")
    stamp = (folders[0] / "train.bin").stat().st_mtime_ns
    prepare_mixture(mixture, tokenizer, sequence_length=SEQUENCE_LENGTH, with_validation=True)
    assert (folders[0] / "train.bin").stat().st_mtime_ns == stamp
    prepare_mixture(
        mixture, Tokenizer.train(DOCUMENTS, vocab_size=270), sequence_length=SEQUENCE_LENGTH, with_validation=False
    )
    assert len(list((cache / "tokens").iterdir())) == 2


def test_a_failed_store_leaves_nothing_and_a_damaged_one_is_named(tokenizer, tmp_path, cache, mixture):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{\n')
    with pytest.raises(DataError, match="line 2"):
        open_store(SourceConfig("jsonl", options={"path": str(bad)}), tokenizer, validation_fraction=0.0)
    assert not list((cache / "tokens").iterdir())
    prepare_mixture(mixture, tokenizer, sequence_length=SEQUENCE_LENGTH, with_validation=True)
    (next((cache / "tokens").iterdir()) / "train.bin").write_bytes(b"12")
    with pytest.raises(DataError, match="damaged"):
        prepare_mixture(mixture, tokenizer, sequence_length=SEQUENCE_LENGTH, with_validation=True)


def test_large_vocabularies_are_stored_whole(text_only, tokenizer, monkeypatch):
    small = open_store(text_only.sources[0], tokenizer, validation_fraction=0.2)["train"]
    monkeypatch.setattr(Tokenizer, "vocab_size", 152_576)
    monkeypatch.setattr(Tokenizer, "fingerprint", "large")
    same_but_padded = Tokenizer.train(DOCUMENTS, vocab_size=290)
    large = open_store(text_only.sources[0], same_but_padded, validation_fraction=0.2)["train"]
    assert (small.token_ids.dtype, large.token_ids.dtype) == (np.uint16, np.uint32)
    assert np.array_equal(small.token_ids, large.token_ids) and small.content == large.content
    assert small.text_bytes == sum(len(t.encode()) for t in training_documents(text_only.sources[0], 0.2))


def test_too_little_text_is_named(open_loader, text_only, mixture):
    with pytest.raises(DataError, match="train part of source 'jsonl'"):
        open_loader(mixture=text_only, sequence_length=10**6)
    loader = open_loader(mixture=MixtureConfig(text_only.sources, validation_fraction=0.0))
    loader.next_batch(1)
    with pytest.raises(DataError, match="No data of source .*validation_fraction is 0"):
        next(loader.fixed_batches(1, 1))


def test_settings_that_cannot_work_are_refused(open_loader, mixture):
    with pytest.raises(ConfigError, match="rank"):
        open_loader(rank=2, world_size=2)
    with pytest.raises(ConfigError, match="weight"):
        SourceConfig("jsonl", weight=0.0)
    with pytest.raises(ConfigError, match="validation_fraction"):
        MixtureConfig(mixture.sources, validation_fraction=1.0)
    with pytest.raises(ConfigError, match="at least one source"):
        MixtureConfig(())


def test_loss_mask_marks_exactly_the_answers(open_loader, mixture, tokenizer):
    loader = open_loader(mixture=MixtureConfig(mixture.sources[1:]))
    batch = loader.next_batch(20)
    question = tokenizer.id_of("?")
    asked = np.flatnonzero(batch.token_ids == question)
    assert np.flatnonzero(batch.loss_mask).tolist() == (asked + 2).tolist()


@pytest.mark.parametrize("depth", [None, 0.0, 0.3, 1.0])
def test_needle_answers_follow_from_the_facts(tokenizer, depth):
    symbols = needle_symbols(tokenizer)
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids, answers = make_needle(symbols, length=150, num_pairs=6, num_queries=3, depth=depth, rng=rng)
        assert ids.shape == (150,) and len(answers) == 3 and answers[-1] == 149
        marks = np.flatnonzero(ids == symbols.fact_mark)
        facts = {int(ids[m + 1]): int(ids[m + 2]) for m in marks}
        assert len(marks) == len(facts) == 6 and set(facts) <= set(symbols.keys)
        assert [facts[int(ids[p - 1])] for p in answers] == ids[answers].tolist()
        assert (ids[answers - 2] == symbols.question_mark).all()
        assert len(set(ids[answers - 1].tolist())) == 3
        filler_end = 150 - 3 * 3
        assert marks.max() + 3 <= filler_end
        if depth is not None:
            first = next(m for m in marks if ids[m + 1] == ids[answers[0] - 1])
            assert abs(first - depth * (filler_end - 3)) <= 3 * 6


def test_needle_that_does_not_fit_is_refused(tokenizer):
    symbols = needle_symbols(tokenizer)
    rng = np.random.default_rng(0)
    ids, _ = make_needle(symbols, length=12, num_pairs=2, num_queries=2, rng=rng)
    assert len(ids) == 12
    for wrong in ({"length": 11}, {"num_pairs": 1}, {"num_pairs": 27}, {"num_queries": 0}, {"depth": 1.5}):
        arguments = {"length": 12, "num_pairs": 2, "num_queries": 2, "depth": None} | wrong
        with pytest.raises(DataError):
            make_needle(symbols, rng=rng, **arguments)
    with pytest.raises(DataError, match="num_keys"):
        needle_symbols(tokenizer, num_keys=27)


def test_repeats_copy_their_first_period(open_loader):
    options = {"min_period": 5, "max_period": 9, "min_length": 24, "loss": "repeats"}
    batch = open_loader(mixture=MixtureConfig((SourceConfig("repeats", options=options),))).next_batch(20)
    start = 0
    for length in batch.document_lengths:
        ids, mask = batch.token_ids[start : start + length - 1], batch.loss_mask[start : start + length]
        period = int(np.argmax(mask))
        assert 5 <= period <= 9 and mask.tolist() == [False] * period + [True] * (length - 1 - period) + [False]
        assert np.array_equal(ids[period:], ids[:-period])
        start += length
