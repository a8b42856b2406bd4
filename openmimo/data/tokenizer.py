"""Byte-level BPE tokenizer in the format of Qwen2 and MiMo, trained here or read from a checkpoint folder.

Text is NFC-normalized and split by Qwen2's pattern, with one token per digit. It has no beginning-of-text token and no
prefix space. Every byte has a token, so plain text never needs special tokens.

Long text is tokenized in pieces, which bounds time and memory. There are two ways to split it:

    text_pieces   the tokens of the pieces always join to the tokens of the text; pieces have no maximum length
    cut_text      pieces have a maximum length; the tokens differ if the text has no safe boundary within that length

A safe boundary is a position where byte-level BPE starts a word and Unicode normalization composes nothing.
"""

import codecs
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from openmimo.core.errors import DataError
from openmimo.core.files import parse_json, read_known_keys, require_folder
from openmimo.data.chat.jinja import check_template, mimo_template, trained_template
from openmimo.data.tokenizer_files import (
    Companions,
    GenerationConfig,
    TokenizerConfig,
    read_backend,
    read_companions,
    token_text,
)

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
THINK_START, THINK_END = "<think>", "</think>"
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", THINK_START, THINK_END)
SPECIAL_TOKENS = CONTROL_TOKENS + MARKUP_TOKENS

# One alternative per line: contractions; a word with the character before it; one digit; punctuation with the line ends
# after it; line ends with the white space before them; trailing white space; other white space.
SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
Schema = TypeVar("Schema")


class Tokenizer:
    """Converts text to token ids and back.

    `encode` produces special tokens only with `allow_special=True`. `data.chat.template.encode_chat` writes the special
    tokens of a chat template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        pad_id: int,
        chat_template: str | None = None,
        companions: Companions | None = None,
    ):
        self._backend = backend
        self._loaded_companions = companions
        self._eos_token_ids = tuple(eos_token_ids)
        self._pad_id = pad_id
        self._chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items()}
        self._control_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> "Tokenizer":
        """Train a vocabulary of at most `vocab_size` ids: 256 bytes, merges, then `special_tokens` as the last ids.

        The same texts give the same tokenizer. Too little text for that many merges gives a smaller vocabulary. The
        chat template is MiMo's with an empty default system message.

        Raises:
            DataError: The bytes and special tokens exceed `vocab_size`.
        """
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise DataError(
                f"A vocabulary of {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens take "
                f"{smallest}."
            )
        if END_OF_TEXT not in special_tokens or TURN_END not in special_tokens:
            raise DataError(f"special_tokens must contain {END_OF_TEXT} and {TURN_END}, which end texts and turns.")
        backend = _new_backend()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_tokens(
            [tokenizers.AddedToken(t, normalized=False, special=t not in MARKUP_TOKENS) for t in special_tokens]
        )
        ids = backend.get_vocab(with_added_tokens=True)
        end_of_text, turn_end = ids[END_OF_TEXT], ids[TURN_END]
        return cls(
            backend,
            eos_token_ids=(turn_end, end_of_text),
            pad_id=end_of_text,
            chat_template=trained_template(),
        )

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Read a checkpoint folder.

        It must contain tokenizer.json. It may contain tokenizer_config.json, chat_template.jinja and
        generation_config.json.

        Raises:
            DataError: A file is missing, malformed, contradictory or not byte-level. The message names file and key.
        """
        folder = require_folder(folder, DataError)
        companions = read_companions(folder, DataError)
        if "tokenizer.json" not in companions.files:
            raise DataError(
                f"{folder} contains no tokenizer.json. Copy tokenizer.json and tokenizer_config.json from the original "
                "checkpoint, or train a tokenizer and save it there (openmimo.data.tokenizer)."
            )
        backend = read_backend(companions.files["tokenizer.json"], folder / "tokenizer.json")
        config = _read(TokenizerConfig, companions, folder, "tokenizer_config.json")
        generation = _read(GenerationConfig, companions, folder, "generation_config.json")
        eos_token_ids = _eos_token_ids(backend, config, generation, folder)
        pad_text = token_text(config.pad_token, f"{folder / 'tokenizer_config.json'}: pad_token")
        pad_id = backend.token_to_id(pad_text or END_OF_TEXT)
        template_file = companions.files.get("chat_template.jinja")
        template = template_file or config.default_template
        if template is not None:
            check_template(template, folder / ("chat_template.jinja" if template_file else "tokenizer_config.json"))
        return cls(
            backend,
            eos_token_ids=eos_token_ids,
            pad_id=eos_token_ids[-1] if pad_id is None else pad_id,
            chat_template=template,
            companions=companions,
        )

    def with_special_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """Return a tokenizer that has these special tokens; missing ones get the ids behind all others."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        missing = [token for token in tokens if token not in self._special_ids]
        backend.add_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in missing])
        files = {**self.companions.files, "tokenizer.json": backend.to_str(pretty=True)}
        return Tokenizer(
            backend,
            eos_token_ids=self._eos_token_ids,
            pad_id=self._pad_id,
            chat_template=self._chat_template,
            companions=Companions(files),
        )

    @property
    def companions(self) -> Companions:
        """The files that `save` writes. For a loaded tokenizer, these are the files it was loaded from."""
        if self._loaded_companions is not None:
            return self._loaded_companions
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._backend.id_to_token(self._eos_token_ids[0]),
            "pad_token": self._backend.id_to_token(self._pad_id),
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        return Companions(
            {
                "tokenizer.json": self._backend.to_str(pretty=True),
                "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
            }
        )

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer's files, which `load` and transformers' AutoTokenizer read.

        The files of a loaded tokenizer, including chat template and generation_config.json, are written unchanged.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.companions.write(Path(folder))

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, including special tokens. A model's embedding may be padded beyond it."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a reply. The end of a turn comes first, then the end of a text."""
        return self._eos_token_ids

    @property
    def pad_id(self) -> int:
        """The padding id."""
        return self._pad_id

    @property
    def end_of_text_id(self) -> int:
        """The id that follows each document in training."""
        return self.id_of(END_OF_TEXT) if END_OF_TEXT in self._special_ids else self._eos_token_ids[-1]

    @property
    def eos_token(self) -> str:
        """The text of the first end-of-reply token."""
        return self._backend.id_to_token(self._eos_token_ids[0]) or ""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The id of every special token by its text."""
        return self._special_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that plain text never produces."""
        return frozenset(self._special_ids.values())

    @property
    def control_token_ids(self) -> frozenset[int]:
        """The special ids that `decode` omits. They end texts and turns; `<think>` and tool tags are not among them."""
        return self._control_ids

    @property
    def chat_template(self) -> str:
        """The Jinja source of the checkpoint's chat template, or of MiMo's if the checkpoint has none."""
        return self._chat_template or mimo_template()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the vocabulary. Tokenizers with equal fingerprints produce the same ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]

    def id_of(self, token: str) -> int:
        """Return the id of a special token or of a text that is one token. Raises DataError otherwise."""
        if token in self._special_ids:
            return self._special_ids[token]
        ids = self.encode(token)
        if len(ids) != 1:
            raise DataError(f"{token!r} is not a single token of this tokenizer; it has {len(ids)} tokens.")
        return ids[0]

    def encode(self, text: str, *, allow_special: bool = False, most_tokens: int | None = None) -> list[int]:
        """Return the ids of `text`. Releases the GIL.

        Args:
            text: The text.
            allow_special: Whether the text of a special token becomes that token.
            most_tokens: Encoding may stop once it has produced more than this number of ids.
        """
        backend = self._backend if allow_special else self._plain_backend
        ids: list[int] = []
        for piece in [text] if allow_special else text_pieces(text):
            # A batch of one, because `backend.encode` does not release the GIL.
            ids += backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids
            if most_tokens is not None and len(ids) > most_tokens:
                break
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts as `encode` does, on all cores."""
        encodings = self._plain_backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `token_ids`. `skip_special` omits control tokens but keeps `<think>` and tool tags.

        Invalid UTF-8 becomes U+FFFD. Ids beyond the vocabulary (padding rows of an embedding) are ignored.
        """
        skipped = self._control_ids if skip_special else ()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; empty for an id beyond the vocabulary."""
        token = self._backend.id_to_token(int(token_id))
        if token is None:
            return b""
        if token in self._special_ids or not _BYTE_OF_CHARACTER.keys() >= set(token):
            return token.encode()
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The same vocabulary without special tokens, so that their text is encoded as plain text."""
        description = json.loads(self._backend.to_str())
        description["added_tokens"] = []
        model = description["model"]
        # Some checkpoints also list special tokens in the vocabulary, where merges could produce them from plain text.
        listed = {token for token in self._special_ids if len(token) > 1 and token in model["vocab"]}
        if listed:
            model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in listed}
            model["merges"] = [merge for merge in model["merges"] if not listed & {"".join(merge), *merge}]
        return tokenizers.Tokenizer.from_str(json.dumps(description))


class StreamDecoder:
    """Incremental decoder of a stream of ids. It holds back the bytes of an incomplete UTF-8 character.

    The joined results of `push` and `flush` equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_token_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that `token_ids` complete; may be empty."""
        new_bytes = b"".join(self._tokenizer.token_bytes(i) for i in token_ids if i not in self._skipped)
        return self._utf8.decode(new_bytes)

    def flush(self) -> str:
        """Return the rest at the end of the stream: U+FFFD if a character is incomplete."""
        return self._utf8.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each printable character of byte-level BPE.

    A printable byte is its own character. The others take the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()


def _new_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read(schema: type[Schema], companions: Companions, folder: Path, name: str) -> Schema:
    """Read one JSON file of a folder as `schema`; defaults if the file does not exist."""
    if name not in companions.files:
        return schema()
    where = str(folder / name)
    return read_known_keys(schema, parse_json(companions.files[name], where, DataError), where, error=DataError)


def _eos_token_ids(
    backend: tokenizers.Tokenizer, config: TokenizerConfig, generation: GenerationConfig, folder: Path
) -> tuple[int, ...]:
    """Return the stop ids of generation_config.json, or else the eos token and the end tokens of MiMo's format."""
    named = generation.eos_token_id
    if named is not None:
        ids = tuple(named) if isinstance(named, list) else (named,)
        unknown = [token_id for token_id in ids if not 0 <= token_id < 1 << 32 or backend.id_to_token(token_id) is None]
        if unknown or not ids:
            raise DataError(
                f"{folder / 'generation_config.json'} has eos_token_id {named}; it must list tokens of tokenizer.json."
            )
        return tuple(dict.fromkeys(ids))
    eos_text = token_text(config.eos_token, f"{folder / 'tokenizer_config.json'}: eos_token")
    candidates = (eos_text, TURN_END, END_OF_TEXT)
    found = [backend.token_to_id(token) for token in candidates if token]
    unique = tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))
    if not unique:
        raise DataError(f"{folder} has no token that ends a text. Set 'eos_token' in tokenizer_config.json.")
    return unique


MOST_CHARACTERS = 32_768  # maximum length of a piece of cut_text
PIECE_CHARACTERS = 2**16  # approximate length of a piece of text_pieces
_WINDOW_CHARACTERS = 2**17
# After a line end or before a space, between two characters that are not white space.
_CUTS_BY_PREFERENCE = (re.compile(r"(?<=\S)\r?\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))
# Before a space between two words, or after a single line end between two characters that are not white space. The
# patterns of GPT-2, Qwen2 and Llama 3 always start a word there.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")


def cut_text(text: str, most_characters: int = MOST_CHARACTERS) -> Iterator[str]:
    """Yield pieces of at most `most_characters` that join to `text`.

    A piece without a line end or space in its second half is cut at the limit, but not before a combining accent. Only
    such a cut can change the ids of the text.
    """
    start = 0
    while len(text) - start > most_characters:
        end = _last_cut(text, start + most_characters // 2, start + most_characters)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _last_cut(text: str, earliest: int, latest: int) -> int:
    """Return the last position to cut at, with earliest < position <= latest."""
    for pattern in _CUTS_BY_PREFERENCE:
        cuts = [match.end() for match in pattern.finditer(text, earliest, latest + 1)]
        cuts = [cut for cut in cuts if earliest < cut <= latest]
        if cuts:
            return cuts[-1]
    unmarked = (cut for cut in range(latest, earliest, -1) if unicodedata.category(text[cut])[0] != "M")
    return next(unmarked, latest)


def text_pieces(text: str) -> Iterator[str]:
    """Yield pieces that join to `text` and whose tokens join to its tokens.

    Each piece except the last has at least `PIECE_CHARACTERS`, and more if the text has no safe boundary.
    """
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        end = _next_cut(text, start + PIECE_CHARACTERS)
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def _next_cut(text: str, position: int) -> int:
    """Return the first safe boundary at or after `position`, or the end of the text."""
    # Search in windows, because a search holds the GIL until it returns.
    while position < len(text):
        found = _CUT.search(text, position, position + _WINDOW_CHARACTERS)
        if found is not None:
            return found.start()
        position += _WINDOW_CHARACTERS - 2
    return len(text)


def utf8_length(text: str) -> int:
    """Return the number of UTF-8 bytes of `text` without encoding it as a whole."""
    return len(text) if text.isascii() else sum(len(part.encode()) for part in blocks(text))


def blocks(text: str) -> Iterator[str]:
    """Split `text` into blocks of `MOST_CHARACTERS`."""
    return (text[start : start + MOST_CHARACTERS] for start in range(0, len(text), MOST_CHARACTERS))
