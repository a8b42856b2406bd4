"""The text files next to the weights of a model folder: tokenizer, chat template, stop tokens.

Their text is kept verbatim when a loaded model is saved. Other programs then read the same settings, including those
that openmimo ignores, such as sampling defaults and the tokenizer class. The parts that openmimo reads are
checked here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from openmimo.core.errors import CheckpointError, DataError, UserError
from openmimo.core.fields import shortened
from openmimo.core.files import file_in_folder, parse_json, read_json, read_known_keys, read_text, write_text_atomic

_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
ADAPTER_CONFIG = "adapter_config.json"  # in a folder of peft that holds an adapter of a model
_TEMPLATES = "additional_chat_templates"  # the folder of transformers for named templates
_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Companions:
    """The companion files of one model.

    Attributes:
        files: Text by file name, relative to the folder.
    """

    files: Mapping[str, str] = field(default_factory=dict)

    def with_max_length(self, tokens: int) -> "Companions":
        """Return the same files with the context length of the tokenizer set to `tokens`, if it states one."""
        text = self.files.get(_TOKENIZER_CONFIG)
        values = {} if text is None else parse_json(text, _TOKENIZER_CONFIG)
        if "model_max_length" not in values:
            return self
        text = json.dumps({**values, "model_max_length": tokens}, indent=2, ensure_ascii=False) + "\n"
        return Companions({**self.files, _TOKENIZER_CONFIG: text})

    def write(self, folder: Path) -> None:
        """Write the files into `folder`, and remove existing companions of another model."""
        for name in companion_names(folder):
            if name not in self.files:
                (folder / name).unlink()
        for name, text in self.files.items():
            write_text_atomic(folder / name, text)


def companion_names(folder: Path) -> list[str]:
    """Return the names of the companions in a folder, relative to it."""
    subfolder = folder / _TEMPLATES
    templates = [] if subfolder.is_symlink() else sorted(subfolder.glob("*.jinja"))
    return [name for name in _NAMES if (folder / name).exists()] + [f"{_TEMPLATES}/{path.name}" for path in templates]


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder, or the base of an adapter, has a tokenizer."""
    return any((part / "tokenizer.json").exists() for part in {folder, base_folder(folder)})


def base_folder(folder: Path, error: type[UserError] = CheckpointError) -> Path:
    """The folder of the base model if `folder` holds an adapter and no model; otherwise `folder` itself.

    The base is a path: absolute, or relative to the working folder or to `folder`.

    Raises:
        UserError: `error`, if there is no such folder.
    """
    if not (folder / ADAPTER_CONFIG).exists() or (folder / "config.json").exists():
        return folder
    path = file_in_folder(folder, ADAPTER_CONFIG, error)
    values = None if path is None else read_json(path, error)
    name = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    candidates = [Path(name), folder / name] if isinstance(name, str) and name else []
    found = next((base for base in candidates if (base / "config.json").is_file()), None)
    if found is None:
        raise error(
            f"{path}: base_model_name_or_path is {shortened(name)}, which is no model folder here. Set it to "
            "the path of the base model."
        )
    return found


def read_companions(folder: Path, error: type[UserError] = CheckpointError) -> Companions:
    """Read the companions of a model folder; an adapter's replace those of its base model.

    Raises:
        UserError: `error`, for one that is not a readable text file in the folder.
    """
    base = base_folder(folder, error)
    files = {} if base == folder else dict(read_companions(base, error).files)
    for name in companion_names(folder):
        path = file_in_folder((folder / name).parent, Path(name).name, error)
        assert path is not None, "companion_names lists existing files"
        files[name] = read_text(path, error)
    return Companions(files)


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
    """Return the text of a token entry of tokenizer_config.json."""
    if isinstance(entry, dict):
        return read_known_keys(_TokenContent, entry, where, error=DataError).content
    return entry


def read_backend(text: str, path: Path) -> tokenizers.Tokenizer:
    """Build the tokenizer of a tokenizer.json.

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
