"""Training never sees held-out data, for conversations, long documents and few documents."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_config

from openmimo.core.errors import CheckpointError, DataError
from openmimo.core.metrics import read_metrics
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.data.loader import Loader, prepare_mixture
from openmimo.data.source import divided_documents, open_source, training_documents
from openmimo.data.store import open_store
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.train.config import CheckpointConfig, EvaluationConfig, Phase, PretrainConfig
from openmimo.train.pretrain import pretrain

TOKENIZER = Tokenizer.train(["system user assistant and some words of english text\n"] * 20, 300)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path / "cache"))


def write_chats(path, number, *, letters=24, seed=0, **extra):
    """Writes conversations with random answers."""
    rng = random.Random(seed)
    lines = []
    for place in range(number):
        answer = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=letters))
        turns = [{"role": "system", "content": ""}, {"role": "user", "content": f"question {place}"}]
        turns.append({"role": "assistant", "content": answer})
        lines.append(json.dumps({"messages": turns, **extra}))
    path.write_text("\n".join(lines) + "\n")
    return SourceConfig("chat", options={"path": str(path)})


def rows_of(config, fraction, *, sequence_length=96, number=80):
    """Returns for each split the documents in the loss, as tuples of token ids."""
    source, options = open_source(config)
    found = {}
    for split, make_row in source.row_makers(options, TOKENIZER, sequence_length, fraction).by_split.items():
        found[split] = set()
        for seed in range(number):
            row = make_row(np.random.default_rng(seed))
            ends = np.cumsum(row.document_lengths)
            for start, end in zip(ends - row.document_lengths, ends, strict=True):
                if row.loss_mask[start:end].any():
                    found[split].add(tuple(row.token_ids[start:end].tolist()))
    return found


def test_conversations_and_their_copies_are_on_one_side(tmp_path):
    config = write_chats(tmp_path / "a.jsonl", 20)
    both = rows_of(config, 0.4)
    assert both["train"] and both["validation"] and not both["train"] & both["validation"]
    assert len(both["train"] | both["validation"]) == 20
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    marked = [json.dumps({**json.loads(line), "source": "copy"}) for line in lines]
    copies = [json.dumps({"tools": [], "messages": json.loads(line)["messages"]}) for line in lines]
    (tmp_path / "a.jsonl").write_text("\n".join(lines + marked + copies))
    assert rows_of(config, 0.4) == both


def test_an_example_that_two_conversations_share_is_not_trained_on(tmp_path):
    lines = []
    for place in range(30):
        turns = []
        for turn in range(2):
            turns.append({"role": "user", "content": f"question {place}"})
            turns.append({"role": "assistant", "content": f"answer {place} {turn}", "reasoning_content": "hm"})
            lines.append(json.dumps({"messages": turns}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    both = rows_of(SourceConfig("chat", options={"path": str(tmp_path / "a.jsonl")}), 0.5, sequence_length=200)
    assert both["validation"] and not both["train"] & both["validation"]


def test_nothing_held_out_is_an_error_that_says_so(tmp_path):
    config = write_chats(tmp_path / "a.jsonl", 8)
    for fraction, said in ((0.0, "validation_fraction is 0"), (1e-6, "is empty: none of its examples .*Raise it")):
        mixture = MixtureConfig((config,), validation_fraction=fraction)
        prepare_mixture(mixture, TOKENIZER, sequence_length=96, with_validation=False)
        with pytest.raises(DataError, match=said):
            prepare_mixture(mixture, TOKENIZER, sequence_length=96, with_validation=True)
        with pytest.raises(DataError, match=said):
            next(Loader(mixture, TOKENIZER, sequence_length=96, seed=0).fixed_batches(1, 1))


def test_loss_on_held_out_letters_does_not_fall_below_chance(tmp_path, without_figures):
    """Random letters are memorized in the training split and stay at chance in the validation split."""
    torch.set_num_threads(1)
    config = write_chats(tmp_path / "a.jsonl", 8, letters=40)
    start = tmp_path / "start"
    shape = replace(tiny_config(num_layers=2), vocab_size=TOKENIZER.vocab_size, max_positions=128)
    save_model(randomize(MiMo(shape), 0), start)
    TOKENIZER.save(start)
    stage = Phase(
        "sft", steps=20, sequence_length=96, global_batch_size=4, learning_rate=1e-2, end_learning_rate=1e-3,
        mtp_weight=0.0, mixture=MixtureConfig((config,), validation_fraction=0.5),
    )  # fmt: skip
    pretrain(
        PretrainConfig(
            run_folder=str(tmp_path / "run"), stages=(stage,), device="cpu", dtype="float32", threads=1,
            init_from=str(start), micro_batch_size=4, log_every_steps=10,
            checkpoints=CheckpointConfig(every_steps=1000), evaluation=EvaluationConfig(every_steps=20, batches=1),
        )
    )  # fmt: skip
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    trained = [row["loss/main"] for row in rows if "loss/main" in row][-1]
    held_out = [row["validation/main"] for row in rows if "validation/main" in row][-1]
    assert trained < 2.0
    assert held_out > 3.0  # ln 26 is 3.26


def one_file(tmp_path, lines=400):
    text = "".join(f"line {number} of a long text with some words\n" for number in range(lines))
    (tmp_path / "one.txt").write_text(text)
    return SourceConfig("text_folder", options={"path": str(tmp_path / "one.txt")}), text


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_one_document_is_divided_by_passages(tmp_path, cache, fraction):
    config, text = one_file(tmp_path)
    pieces = list(divided_documents(config, fraction))
    assert "".join(piece.text for piece in pieces) == text
    sides = {split: [piece.text for piece in pieces if piece.split == split] for split in ("train", "validation")}
    assert sides["train"] and sides["validation"] and not set(sides["train"]) & set(sides["validation"])
    assert list(training_documents(config, fraction)) == sides["train"]
    stores = open_store(config, TOKENIZER, validation_fraction=fraction)
    for split, store in stores.items():
        decoded = [
            TOKENIZER.decode(store.token_ids[a:b]) for a, b in zip(store.offsets, store.offsets[1:], strict=False)
        ]
        assert "".join(decoded) == "".join(sides[split]) and all(passage in text for passage in decoded)
    mixture = MixtureConfig((config,), validation_fraction=fraction)
    prepare_mixture(mixture, TOKENIZER, sequence_length=64, with_validation=True)


def test_one_document_with_nothing_held_out_stays_whole(tmp_path, cache):
    config, text = one_file(tmp_path)
    stores = open_store(config, TOKENIZER, validation_fraction=0.0)
    assert stores["train"].offsets.tolist() == [0, len(stores["train"].token_ids)]
    assert stores["train"].token_ids.tolist() == [*TOKENIZER.encode(text), TOKENIZER.end_of_text_id]
    with pytest.raises(DataError, match="validation_fraction is 0"):
        Loader(
            replace(MixtureConfig((config,)), validation_fraction=0.0), TOKENIZER, sequence_length=64, seed=0
        ).fixed_batches(1, 1).__next__()


def test_changed_conversations_are_refused_and_moved_ones_are_not(tmp_path):
    config = write_chats(tmp_path / "a.jsonl", 20)
    mixture = MixtureConfig((config,), validation_fraction=0.3)
    state = json.loads(json.dumps(Loader(mixture, TOKENIZER, sequence_length=96, seed=0).state()))
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    moved = MixtureConfig((SourceConfig("chat", options={"path": str(tmp_path / "b.jsonl")}),), 0.3)
    Loader(moved, TOKENIZER, sequence_length=96, seed=0).load_state(state)
    text = (tmp_path / "b.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(text.replace("question 3", "question z"))
    with pytest.raises(
        CheckpointError, match=r"data of source 'chat' \(.*b.jsonl\) has changed: .*, read as .*a.jsonl"
    ):
        Loader(moved, TOKENIZER, sequence_length=96, seed=0).load_state(state)
