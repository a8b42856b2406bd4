"""The tokenizer against tokenizers and transformers, and its own guarantees."""

import json
import random

import numpy as np
import pytest
import tokenizers

from openmimo.core.errors import DataError
from openmimo.core.records import Message
from openmimo.data import tokenizer as tokenizer_module
from openmimo.data.chat.template import encode_chat
from openmimo.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, StreamDecoder, Tokenizer

TEXTS = [
    "The quick brown fox doesn't jump over 13 lazy dogs in 2026.\n\n  Indented    text\t\n",
    "def longest(words):\n    return max(words, key=len)  # the longest of the words\n",
    "Zürich, naïve café, 日本語のテキスト, Привет мир, 🙂👩\u200d👩\u200d👧 and e\u0301.\n",
]
SPECIAL_TEXT = "<|im_start|>user\nHi<|im_end|><tool_call></think><|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocab_size=400)


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    return tmp_path


def test_vocabulary_holds_every_byte_and_the_special_tokens_last(tokenizer):
    assert tokenizer.vocab_size == 400
    assert {tokenizer.token_bytes(i) for i in range(400 - len(SPECIAL_TOKENS))} >= {bytes([b]) for b in range(256)}
    assert [tokenizer.decode([i], skip_special=False) for i in range(400 - len(SPECIAL_TOKENS), 400)] == list(
        SPECIAL_TOKENS
    )
    assert tokenizer.eos_token_ids == (tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>"))
    assert tokenizer.pad_id == tokenizer.end_of_text_id == tokenizer.id_of("<|endoftext|>")


def test_training_is_reproducible(tokenizer):
    assert Tokenizer.train(TEXTS * 3, vocab_size=400).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(TEXTS * 3, vocab_size=401).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("text", [*TEXTS[:2], "", " ", "\r\n\r\n x", "\ud7ff\ufdd0\0", SPECIAL_TEXT])
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x"])[0] == tokenizer.encode(text)


def test_a_text_too_small_for_the_vocabulary_gives_a_smaller_one():
    assert Tokenizer.train(["ab ab"], vocab_size=400).vocab_size < 270


def test_text_is_normalized_to_nfc(tokenizer):
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


def test_plain_text_never_gives_special_tokens(tokenizer):
    assert not tokenizer.special_token_ids & set(tokenizer.encode(SPECIAL_TEXT))
    allowed = tokenizer.encode(SPECIAL_TEXT, allow_special=True)
    names = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</think>", "<|endoftext|>"]
    assert [i for i in allowed if i in tokenizer.special_token_ids] == [tokenizer.id_of(name) for name in names]
    assert tokenizer.decode(allowed) == "user\nHi<tool_call></think>"
    assert tokenizer.decode(allowed, skip_special=False) == SPECIAL_TEXT


def test_pieces_are_those_of_the_qwen2_pattern():
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str("I'LL pay $120.50  now!!\n\n  ok\u3000日本 ")]
    assert pieces == [
        "I",
        "'LL",
        " pay",
        " $",
        "1",
        "2",
        "0",
        ".",
        "5",
        "0",
        " ",
        " now",
        "!!\n\n",
        " ",
        " ok",
        "\u3000日本",
        " ",
    ]


def test_digits_are_never_merged():
    tokenizer = Tokenizer.train(["2026 2026 2026 20262026"] * 50, vocab_size=400)
    assert len(tokenizer.encode("2026")) == 4


def test_id_of_needs_exactly_one_token(tokenizer):
    assert tokenizer.token_bytes(tokenizer.id_of("A")) == b"A"
    with pytest.raises(DataError, match="'日本語の夢'"):
        tokenizer.id_of("日本語の夢")


def test_transformers_loads_what_we_save(tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    (folder / "config.json").write_text(json.dumps({"model_type": "mimo_v2_flash"}))
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, SPECIAL_TEXT]:
        ids = peer(text).input_ids
        assert ids == tokenizer.encode(text, allow_special=True)
        assert peer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert (peer.eos_token_id, peer.pad_token_id) == (tokenizer.eos_token_ids[0], tokenizer.pad_id)
    assert peer.chat_template == tokenizer.chat_template


def test_load_gives_back_what_save_wrote(tokenizer, folder):
    loaded = Tokenizer.load(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.eos_token_ids == tokenizer.eos_token_ids
    assert loaded.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


def test_load_reads_the_checkpoint_s_own_settings(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": {"content": "<|endoftext|>"}, "chat_template": [{"name": "default", "template": "own"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(folder)
    assert loaded.eos_token_ids == (loaded.id_of("<|endoftext|>"), loaded.id_of("<|im_end|>"))
    assert loaded.chat_template == "own"
    assert loaded.decode(encode_chat(loaded, [Message("user", "x")])) == "own"
    (folder / "chat_template.jinja").write_text("file")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert Tokenizer.load(folder).chat_template == "file"
    assert Tokenizer.load(folder).eos_token_ids == (7, 8)


def test_load_needs_nothing_but_tokenizer_json(folder):
    (folder / "tokenizer_config.json").unlink()
    loaded = Tokenizer.load(folder)
    assert loaded.eos_token_ids == (loaded.id_of("<|im_end|>"), loaded.id_of("<|endoftext|>"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "contains no tokenizer.json"),
        ("{", "not valid JSON"),
        ('{"model": {"type": "Unigram"}, "decoder": {"type": "Metaspace"}}', "Unigram"),
    ],
)
def test_unreadable_folders_are_named(tmp_path, content, named):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=named) as raised:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_impossible_vocabularies_are_refused():
    with pytest.raises(DataError, match="265"):
        Tokenizer.train(TEXTS, vocab_size=264)
    with pytest.raises(DataError, match="endoftext"):
        Tokenizer.train(TEXTS, vocab_size=400, special_tokens=("<|im_end|>",))


def test_decoding_matches_the_tokenizers_library_on_any_ids(tokenizer, folder):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, tokenizer.vocab_size, 20).tolist()
        assert tokenizer.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_ids_beyond_the_vocabulary_give_nothing(tokenizer):
    assert tokenizer.decode([tokenizer.id_of("A"), 10**6, tokenizer.vocab_size]) == "A"


def test_stream_equals_decode_and_never_splits_a_character(tokenizer):
    ids = tokenizer.encode(TEXTS[2] + "🙂" * 5)
    stream = StreamDecoder(tokenizer)
    parts = [stream.push([i]) for i in ids]
    assert "".join(parts) == tokenizer.decode(ids)
    assert stream.flush() == ""
    assert not any("\ufffd" in part for part in parts)
    assert "" in parts  # some character took several tokens


def test_stream_equals_decode_on_any_ids(tokenizer):
    rng = np.random.default_rng(1)
    for skip_special in (True, False):
        for _ in range(100):
            ids = rng.integers(0, tokenizer.vocab_size + 5, 30).tolist()
            stream = StreamDecoder(tokenizer, skip_special=skip_special)
            text = "".join(stream.push(ids[i : i + 3]) for i in range(0, 30, 3)) + stream.flush()
            assert text == tokenizer.decode(ids, skip_special=skip_special)


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 8)
    monkeypatch.setattr(tokenizer_module, "_WINDOW_CHARACTERS", 5)
    draw = random.Random(0)
    characters = "abc é\u0301\n\r\t 1²'s.=日\u1161\u1100 \x1c\x85"
    num_pieces = 0
    for _ in range(2000):
        text = "".join(draw.choice(characters) for _ in range(60))
        pieces = list(tokenizer_module.text_pieces(text))
        assert "".join(pieces) == text
        assert tokenizer.encode(text) == tokenizer._plain_backend.encode(text, add_special_tokens=False).ids
        num_pieces += len(pieces)
    assert num_pieces > 3000


def test_a_text_with_too_many_tokens_is_read_in_part(tokenizer):
    text = "the words of a text " * 20_000
    assert 100 < len(tokenizer.encode(text, most_tokens=100)) < len(tokenizer.encode(text))
    turns = [Message("user", text)]
    assert 100 < len(encode_chat(tokenizer, turns, most_tokens=100)) < len(encode_chat(tokenizer, turns))
