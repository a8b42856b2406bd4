"""The parts of a checkpoint's tokenizer files that openmimo reads, with their checks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from openmimo.core.errors import DataError
from openmimo.core.reading import parse_json, read_known_keys

_MAX_IDS = 1 << 24  # the limit of a model's vocabulary


@dataclass(frozen=True)
class NamedTemplate:
    """One of several chat templates."""

    name: str
    template: str


@dataclass(frozen=True)
class TokenizerConfig:
    """The fields read from tokenizer_config.json. A token is a string or, in older files, an object with `content`."""

    eos_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    chat_template: str | list[NamedTemplate] | None = None

    @property
    def default_template(self) -> str | None:
        """The chat template; if there are several, the one named "default"."""
        if isinstance(self.chat_template, list):
            return {entry.name: entry.template for entry in self.chat_template}.get("default")
        return self.chat_template


@dataclass(frozen=True)
class GenerationConfig:
    """The fields read from generation_config.json."""

    eos_token_id: int | list[int] | None = None


@dataclass(frozen=True)
class _TokenContent:
    """The fields read from a token object."""

    content: str


@dataclass(frozen=True)
class _Model:
    """The fields read from `model` of tokenizer.json."""

    type: str
    dropout: float | None = None


@dataclass(frozen=True)
class _AddedToken:
    """The fields read from an entry of `added_tokens` of tokenizer.json."""

    id: int
    content: str


@dataclass(frozen=True)
class _TokenizerFile:
    """The fields read from tokenizer.json. The tokenizers library checks the others."""

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
    """Builds the tokenizer of a tokenizer.json.

    Raises:
        DataError: The file `path` is malformed, is not byte-level BPE, or does not round-trip text: a byte has no
            token, merges have dropout, or two tokens have one id.
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
        raise DataError(f"{where} is not a tokenizer: {error}. Copy it again from the checkpoint.") from error
    backend.no_padding()
    backend.no_truncation()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    missing = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in vocabulary]
    if missing:
        raise DataError(f"{where} has no token for {len(missing)} of the 256 bytes; text with them would be lost.")
    if max(vocabulary.values()) >= _MAX_IDS:
        raise DataError(f"{where} has the id {max(vocabulary.values())}; ids are below {_MAX_IDS}.")
    for number, token in enumerate(added):
        if not token.content or vocabulary.get(token.content) != token.id:
            raise DataError(
                f"{where}: added_tokens[{number}] is {token.content!r} with id {token.id}, but the tokenizer's id for "
                f"it is {vocabulary.get(token.content)}."
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
        raise DataError(f"{where}: model: dropout is {model.dropout}, which makes tokenization random; set it to null.")
    pre_tokenizer = described.pre_tokenizer or {}
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    kinds = [step.get("type") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    if "ByteLevel" not in kinds:
        raise DataError(f"{where}: pre_tokenizer has no ByteLevel step, which byte-level BPE needs.")
