"""Byte-level BPE of the Qwen2 kind, as MiMo uses it: trained here, or read from a checkpoint folder.

Text is NFC-normalized and cut by Qwen2's pattern (digits one at a time); there is no beginning-of-text token and no
prefix space. Every byte has a token, so any text can be encoded and special tokens are never needed for it.

Long text is tokenized in pieces, so that time and memory are bounded by the piece. There are two ways to cut:

    text_pieces   the tokens of the pieces always join to the tokens of the text; a piece may be long
    cut_text      a piece is never longer than its limit; the tokens may differ where no place fits within the limit

Both cut where byte-level BPE begins a word and Unicode normalization composes nothing.
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
from openmimo.data.chat.jinja import check_template, mimo_template
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

# One alternative a line: contractions; a word with the character before it; one digit; punctuation with the line ends
# after it; line ends with the blanks before them; trailing blanks; other blanks.
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
    """Text to token ids and back.

    `encode` yields special tokens only with `allow_special=True`; a chat template writes them in
    `data.chat.template.encode_chat`.
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
        """Learns a vocabulary of at most `vocab_size` ids: 256 bytes, merges, then `special_tokens` as the last ids.

        A text too small for that many merges gives a smaller vocabulary. Raises DataError if the bytes and special
        tokens do not fit. The same texts give the same tokenizer.
        """
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise DataError(
                f"A vocabulary of {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens take "
                f"{smallest}."
            )
        if END_OF_TEXT not in special_tokens or TURN_END not in special_tokens:
            raise DataError(f"special_tokens must hold {END_OF_TEXT} and {TURN_END}, which end texts and turns.")
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
        return cls(backend, eos_token_ids=(turn_end, end_of_text), pad_id=end_of_text)

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Reads a checkpoint folder: tokenizer.json, and if there tokenizer_config.json, chat_template.jinja and
        generation_config.json. Raises DataError for a file that is missing, malformed, contradictory or not
        byte-level; the message names file and key.
        """
        folder = require_folder(folder, DataError)
        companions = read_companions(folder, DataError)
        if "tokenizer.json" not in companions.files:
            raise DataError(
                f"{folder} holds no tokenizer.json. Copy tokenizer.json and tokenizer_config.json from the checkpoint "
                "that this folder came from, or train a tokenizer and save it there (openmimo.data.tokenizer)."
            )
        backend = read_backend(companions.files["tokenizer.json"], folder / "tokenizer.json")
        config = _read(TokenizerConfig, companions, folder, "tokenizer_config.json")
        generation = _read(GenerationConfig, companions, folder, "generation_config.json")
        eos_token_ids = _eos_token_ids(backend, config, generation, folder)
        pad_text = token_text(config.pad_token, f"{folder / 'tokenizer_config.json'}: pad_token")
        pad_id = backend.token_to_id(pad_text or END_OF_TEXT)
        own_template = companions.files.get("chat_template.jinja")
        template = own_template or config.default_template
        if template is not None:
            check_template(template, folder / ("chat_template.jinja" if own_template else "tokenizer_config.json"))
        return cls(
            backend,
            eos_token_ids=eos_token_ids,
            pad_id=eos_token_ids[-1] if pad_id is None else pad_id,
            chat_template=template,
            companions=companions,
        )

    @property
    def companions(self) -> Companions:
        """The files that `save` writes: those that the tokenizer was loaded from, or those of a new one."""
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
        """Writes the tokenizer's files, which `load` and transformers' AutoTokenizer read.

        One that was loaded is written as it was, with its chat template and generation_config.json.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.companions.write(Path(folder))

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included. A model's embedding may be padded beyond it."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a reply: the end of a turn first, then the end of a text."""
        return self._eos_token_ids

    @property
    def pad_id(self) -> int:
        """The id for padding."""
        return self._pad_id

    @property
    def end_of_text_id(self) -> int:
        """The id put after each document in training."""
        return self.id_of(END_OF_TEXT) if END_OF_TEXT in self._special_ids else self._eos_token_ids[-1]

    @property
    def eos_token(self) -> str:
        """The text of the first stop token."""
        return self._backend.id_to_token(self._eos_token_ids[0]) or ""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The id of every special token, by its text."""
        return self._special_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Every id that plain text cannot give."""
        return frozenset(self._special_ids.values())

    @property
    def control_token_ids(self) -> frozenset[int]:
        """The special ids that `decode` leaves out: ends of texts and turns, not `<think>` and tool markup."""
        return self._control_ids

    @property
    def chat_template(self) -> str:
        """The Jinja source of the checkpoint's chat template, or MiMo's if it brings none."""
        return self._chat_template or mimo_template()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short name of this vocabulary: equal for tokenizers that give the same ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]

    def id_of(self, token: str) -> int:
        """The id of a special token, or of a text that is exactly one token. Raises DataError if there is none."""
        if token in self._special_ids:
            return self._special_ids[token]
        ids = self.encode(token)
        if len(ids) != 1:
            raise DataError(f"{token!r} is not one token of this tokenizer; it takes {len(ids)}.")
        return ids[0]

    def encode(self, text: str, *, allow_special: bool = False, most_tokens: int | None = None) -> list[int]:
        """The ids of `text`. With `allow_special`, the text of a special token becomes that token.

        With `most_tokens`, a text that has more may be read in part only: there are then more ids than `most_tokens`.
        Other threads of Python run meanwhile.
        """
        backend = self._backend if allow_special else self._plain_backend
        ids: list[int] = []
        for piece in [text] if allow_special else text_pieces(text):
            # A batch of one: `encode` holds the interpreter's lock.
            ids += backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids
            if most_tokens is not None and len(ids) > most_tokens:
                break
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        encodings = self._plain_backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `token_ids`, without control tokens unless asked (`<think>` and tool markup are always kept).

        Bytes that are not UTF-8 become U+FFFD. Ids beyond the vocabulary (padding rows of an embedding) give nothing.
        """
        skipped = self._control_ids if skip_special else ()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; empty for an id beyond the vocabulary."""
        token = self._backend.id_to_token(int(token_id))
        if token is None:
            return b""
        if token in self._special_ids or not _BYTE_OF_CHARACTER.keys() >= set(token):
            return token.encode()
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The same vocabulary without special tokens: it reads their text as text."""
        description = json.loads(self._backend.to_str())
        description["added_tokens"] = []
        model = description["model"]
        # Some checkpoints list special tokens in the vocabulary too, where merges could make them of plain text.
        listed = {token for token in self._special_ids if len(token) > 1 and token in model["vocab"]}
        if listed:
            model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in listed}
            model["merges"] = [merge for merge in model["merges"] if not listed & {"".join(merge), *merge}]
        return tokenizers.Tokenizer.from_str(json.dumps(description))


class StreamDecoder:
    """Decodes a stream of ids to text as it comes, holding back the bytes of an unfinished UTF-8 character.

    All texts from `push`, then `flush`, joined, equal `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_token_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The new text that `token_ids` complete; may be empty."""
        new_bytes = b"".join(self._tokenizer.token_bytes(i) for i in token_ids if i not in self._skipped)
        return self._utf8.decode(new_bytes)

    def flush(self) -> str:
        """What is left at the end of the stream: U+FFFD for a character that never came whole."""
        return self._utf8.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself, or the next free one from U+0100 on."""
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
    """One JSON file of a folder as `schema`; the defaults if there is no such file."""
    if name not in companions.files:
        return schema()
    where = str(folder / name)
    return read_known_keys(schema, parse_json(companions.files[name], where, DataError), where, error=DataError)


def _eos_token_ids(
    backend: tokenizers.Tokenizer, config: TokenizerConfig, generation: GenerationConfig, folder: Path
) -> tuple[int, ...]:
    """The stop ids: generation_config.json's if it names some, else the eos token and the two ends of MiMo's format."""
    named = generation.eos_token_id
    if named is not None:
        ids = tuple(named) if isinstance(named, list) else (named,)
        unknown = [token_id for token_id in ids if not 0 <= token_id < 1 << 32 or backend.id_to_token(token_id) is None]
        if unknown or not ids:
            raise DataError(
                f"{folder / 'generation_config.json'} has eos_token_id {named}; it must name tokens of tokenizer.json."
            )
        return tuple(dict.fromkeys(ids))
    eos_text = token_text(config.eos_token, f"{folder / 'tokenizer_config.json'}: eos_token")
    candidates = (eos_text, TURN_END, END_OF_TEXT)
    found = [backend.token_to_id(token) for token in candidates if token]
    unique = tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))
    if not unique:
        raise DataError(f"{folder} names no token that ends a text: give tokenizer_config.json an 'eos_token'.")
    return unique


MOST_CHARACTERS = 32_768  # in a piece of cut_text
PIECE_CHARACTERS = 2**16  # in a piece of text_pieces, roughly
_WINDOW_CHARACTERS = 2**17
# After a line end or before a space, with a printed character on both sides.
_PLACES = (re.compile(r"(?<=\S)\r?\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))
# Before a space between two words, or after a single line end between two characters that are not blank. The patterns
# of GPT-2, Qwen2 and Llama 3 always begin a word there.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")


def cut_text(text: str, most_characters: int = MOST_CHARACTERS) -> Iterator[str]:
    """Yields pieces of at most `most_characters` that join to `text`.

    A piece without a line end or a space in its second half is cut at the limit (but not before a combining accent).
    Only there, the ids may differ from those of the whole text.
    """
    start = 0
    while len(text) - start > most_characters:
        end = _last_place(text, start + most_characters // 2, start + most_characters)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _last_place(text: str, earliest: int, latest: int) -> int:
    """The last place to cut at, with earliest < place <= latest."""
    for pattern in _PLACES:
        places = [match.end() for match in pattern.finditer(text, earliest, latest + 1)]
        places = [place for place in places if earliest < place <= latest]
        if places:
            return places[-1]
    unmarked = (place for place in range(latest, earliest, -1) if unicodedata.category(text[place])[0] != "M")
    return next(unmarked, latest)


def text_pieces(text: str) -> Iterator[str]:
    """Yields pieces that join to `text` and whose tokens join to its tokens.

    A piece has at least `PIECE_CHARACTERS`, except the last, and more where the text has no place to cut.
    """
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        end = _next_cut(text, start + PIECE_CHARACTERS)
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def _next_cut(text: str, position: int) -> int:
    """The first place to cut at or after `position`; the end of the text where there is none."""
    # In windows: one search holds the interpreter for as long as it lasts.
    while position < len(text):
        found = _CUT.search(text, position, position + _WINDOW_CHARACTERS)
        if found is not None:
            return found.start()
        position += _WINDOW_CHARACTERS - 2
    return len(text)


def utf8_length(text: str) -> int:
    """Bytes of `text` in UTF-8, without a copy of the whole."""
    return len(text) if text.isascii() else sum(len(part.encode()) for part in blocks(text))


def blocks(text: str) -> Iterator[str]:
    """`text` in blocks of equal length, wherever they end."""
    return (text[start : start + MOST_CHARACTERS] for start in range(0, len(text), MOST_CHARACTERS))
