"""The files that stand with the weights in a model folder and travel with them: tokenizer, chat template, stop tokens.

Their text is kept as it is. A folder that is saved from one that was loaded thus says the same to other programs, and
what has no meaning here, such as sampling defaults and the tokenizer's class, is not lost.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openmimo.core.errors import CheckpointError, UserError
from openmimo.core.files import write_text_atomic
from openmimo.core.reading import file_in_folder, parse_json, read_text

_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # transformers' folder for templates that have a name of their own
_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Companions:
    """The companions of one model. files: their text by name, relative to the folder."""

    files: Mapping[str, str] = field(default_factory=dict)

    def with_max_length(self, tokens: int) -> "Companions":
        """The same files; if the tokenizer states the length of its model's context, it states `tokens`."""
        text = self.files.get(_TOKENIZER_CONFIG)
        values = {} if text is None else parse_json(text, _TOKENIZER_CONFIG)
        if "model_max_length" not in values:
            return self
        text = json.dumps({**values, "model_max_length": tokens}, indent=2, ensure_ascii=False) + "\n"
        return Companions({**self.files, _TOKENIZER_CONFIG: text})

    def write(self, folder: Path) -> None:
        """Writes the files into `folder`, and removes companions of another model that are there."""
        for name in companion_names(folder):
            if name not in self.files:
                (folder / name).unlink()
        for name, text in self.files.items():
            write_text_atomic(folder / name, text)


def companion_names(folder: Path) -> list[str]:
    """The companions that a folder holds, by name relative to it."""
    subfolder = folder / _TEMPLATES
    templates = [] if subfolder.is_symlink() else sorted(subfolder.glob("*.jinja"))
    return [name for name in _NAMES if (folder / name).exists()] + [f"{_TEMPLATES}/{path.name}" for path in templates]


def read_companions(folder: Path, error: type[UserError] = CheckpointError) -> Companions:
    """The companions in a model folder. Raises `error` for one that is no readable text file of that folder."""
    files = {}
    for name in companion_names(folder):
        path = file_in_folder((folder / name).parent, Path(name).name, error)
        files[name] = read_text(path, error)
    return Companions(files)
