"""What is read of a checkpoint's tokenizer files, and what must hold for it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from openmimo.core.errors import DataError
from openmimo.core.reading import parse_json, read_known_keys

_MAX_IDS = 1 << 24  # as many as a model's vocabulary may have


@dataclass(frozen=True)
class NamedTemplate:
    """One of several chat templates."""

    name: str
    template: str


@dataclass(frozen=True)
class TokenizerConfig:
    """What is read of tokenizer_config.json. A token is its text or, in older files, an object with its content."""

    eos_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    chat_template: str | list[NamedTemplate] | None = None

    @property
    def default_template(self) -> str | None:
        """The chat template: the one that stands there, or of several the one named "default"."""
        if isinstance(self.chat_template, list):
            return {entry.name: entry.template for entry in self.chat_template}.get("default")
        return self.chat_template


@dataclass(frozen=True)
class GenerationConfig:
    """What is read of generation_config.json."""

    eos_token_id: int | list[int] | None = None


@dataclass(frozen=True)
class _TokenContent:
    """What is read of a token that is spelled out as an object."""

    content: str


@dataclass(frozen=True)
class _Model:
    """What is read of tokenizer.json's model."""

    type: str
    dropout: float | None = None


@dataclass(frozen=True)
class _AddedToken:
    """What is read of one of tokenizer.json's added tokens."""

    id: int
    content: str


@dataclass(frozen=True)
class _TokenizerFile:
    """What is read of tokenizer.json, apart from what the tokenizers library checks itself."""

    model: dict[str, Any]
    decoder: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    added_tokens: list[dict[str, Any]] | None = None


def token_text(entry: str | dict[str, Any] | None, where: str) -> str | None:
    """The text of a token entry of tokenizer_config.json."""
    if isinstance(entry, dict):
        return read_known_keys(_TokenContent, entry, where, error=DataError).content
    return entry


def read_backend(text: str, path: Path) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes.

    Raises DataError, naming `path`, if it is malformed, no byte-level BPE, or would give another text back than it was
    given: a byte without a token, a merge that is left out at random, an id that another token has.
    """
    where = str(path)
    values = parse_json(text, where, DataError)
    described = read_known_keys(_TokenizerFile, values, where, error=DataError)
    _check_byte_level(described, where)
    added = [
        read_known_keys(_AddedToken, entry, f"{where}: added_tokens[{number}]", error=DataError)
        for number, entry in enumerate(described.added_tokens or [])
    ]
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{where} is no tokenizer: {error}. Copy it again from the checkpoint.") from error
    backend.no_padding()
    backend.no_truncation()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lacking = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in vocabulary]
    if lacking:
        raise DataError(f"{where} has no token for {len(lacking)} of the 256 bytes; a text with them would be cut.")
    if max(vocabulary.values()) >= _MAX_IDS:
        raise DataError(f"{where} has the id {max(vocabulary.values())}; ids are below {_MAX_IDS}.")
    for number, token in enumerate(added):
        if not token.content or vocabulary.get(token.content) != token.id:
            raise DataError(
                f"{where}: added_tokens[{number}] is {token.content!r} with id {token.id}, but the tokenizer gives it "
                f"{vocabulary.get(token.content)}."
            )
    return backend


def _check_byte_level(described: _TokenizerFile, where: str) -> None:
    model = read_known_keys(_Model, described.model, f"{where}: model", error=DataError)
    decoder_type = (described.decoder or {}).get("type")
    if (model.type, decoder_type) != ("BPE", "ByteLevel"):
        raise DataError(
            f"{where} is a {model.type} tokenizer with a {decoder_type} decoder; openmimo reads byte-level BPE "
            "tokenizers (BPE with a ByteLevel decoder), the kind of MiMo and Qwen2."
        )
    if model.dropout:
        raise DataError(f"{where}: model: dropout is {model.dropout}; one text must always give the same tokens.")
    pre_tokenizer = described.pre_tokenizer or {}
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    kinds = [step.get("type") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    if "ByteLevel" not in kinds:
        raise DataError(f"{where}: pre_tokenizer has no ByteLevel step, so text could not be written in bytes.")
