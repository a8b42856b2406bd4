"""`openmimo eval MODEL --text FILE` against cross-entropy that torch computes from the logits."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config
from torch.nn import functional

import openmimo
from openmimo import cli
from openmimo.core.errors import ConfigError, DataError
from openmimo.data.tokenizer import Tokenizer
from openmimo.evals.config import EvalConfig
from openmimo.evals.text_loss import measure_last, text_windows
from openmimo.model.mimo import MiMo

TEXTS = ["some words and some more words, é and so on. " * 9, "x", "another document with other words in it. " * 5]


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("speaking")
    openmimo.save_model(randomize(MiMo(replace(tiny_config(mtp_heads=1), vocab_size=300)), 0), folder / "model")
    Tokenizer.train(["some words and some more words"] * 30, 300).save(folder / "model")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (folder / "my.jsonl").write_text(lines)
    return folder


def expected(folder, window):
    """Position, loss and number of bytes of every counted token."""
    model, tokenizer = openmimo.load_model(folder / "model"), Tokenizer.load(folder / "model")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for start in range(0, len(ids), window):
            part = torch.tensor(ids[start : start + window])
            if len(part) > 1:
                losses = functional.cross_entropy(model.logits(part)[:-1], part[1:], reduction="none")
                sizes = [len(tokenizer.token_bytes(int(token))) for token in part[1:]]
                yield from zip(range(1, len(part)), losses.tolist(), sizes, strict=True)


def test_the_loss_is_that_of_the_logits_by_position(speaking, capsys, monkeypatch):
    output = speaking / "losses.json"
    arguments = ["--text", str(speaking / "my.jsonl"), "--text-field", "body", "--window", "100"]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["openmimo", "eval", str(speaking / "model"), *arguments, "--output", str(output)])
    cli.main()
    rows = list(expected(speaking, 100))
    losses = json.loads(output.read_text())["losses"]
    assert [(loss["first"], loss["last"]) for loss in losses] == [(1, 31), (32, 63), (64, 99), (1, 99)]
    for loss in losses:
        inside = [(nats, size) for place, nats, size in rows if loss["first"] <= place <= loss["last"]]
        nats, size = (sum(column) for column in zip(*inside, strict=True))
        assert loss["tokens"] == len(inside)
        assert loss["nats_per_token"] == pytest.approx(nats / len(inside), rel=1e-4)
        assert loss["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    printed = capsys.readouterr().out
    assert f"{losses[-1]['bits_per_byte']:.4f}" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_windows_stop_at_the_limit_of_tokens(speaking):
    tokenizer = Tokenizer.load(speaking / "model")
    config = EvalConfig("model", text=str(speaking / "my.jsonl"), text_field="body", text_tokens=50, window=20)
    windows = text_windows(config, tokenizer, 2048)
    assert [len(window) for window in windows] == [20, 20, 10]
    assert sum(windows, []) == tokenizer.encode(TEXTS[0])[:50]
    everything = text_windows(replace(config, text_tokens=0), tokenizer, 2048)
    assert sum(map(len, everything)) == sum(len(ids) for ids in map(tokenizer.encode, TEXTS) if len(ids) > 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "a.txt", "task": "other"}, "--task has no effect with --text"),
        ({"text": "a.txt", "lengths": (8,)}, "--lengths has no effect with --text"),
        ({"window": 8}, "--window has no effect without --text"),
        ({"text_field": "body"}, "--text-field has no effect without --text"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig("model", **settings)


def test_an_empty_text_is_named(speaking, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    config = EvalConfig("model", text=str(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match=r"empty\.txt has no document"):
        text_windows(config, Tokenizer.load(speaking / "model"), 2048)


def test_a_window_above_the_positions_is_refused_before_the_weights_are_read(speaking, capsys, monkeypatch):
    arguments = ["--text", str(speaking / "my.jsonl"), "--text-field", "body", "--window", "10000000"]
    monkeypatch.setattr(sys, "argv", ["openmimo", "eval", str(speaking / "model"), *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert "positions" in capsys.readouterr().err


def test_the_last_tokens_are_the_same_for_every_context(speaking):
    model, tokenizer = openmimo.load_model(speaking / "model"), Tokenizer.load(speaking / "model")
    ids = tokenizer.encode(TEXTS[0])[:150]

    def score(token_ids):
        logprobs = model.logits(torch.tensor(token_ids)).detach().log_softmax(-1)
        return logprobs[:-1].gather(1, torch.tensor(token_ids)[1:, None])[:, 0]

    losses = measure_last([ids[:100], ids[50:150], ids[:40]], 20, score, tokenizer, print)
    assert [loss.first for loss in losses] == [32, 64, 80] and {loss.tokens for loss in losses} == {40}
    for loss in losses:
        nats = 0.0
        for window in (ids[:100], ids[50:150]):
            part = torch.tensor(window[-20 - loss.first :])
            nats += float(functional.cross_entropy(model.logits(part).detach()[-21:-1], part[-20:], reduction="sum"))
        assert loss.nats_per_token == pytest.approx(nats / 40, rel=1e-4)
    with pytest.raises(DataError, match="last tokens need more"):
        measure_last([ids[:50]], 20, score, tokenizer, print)
