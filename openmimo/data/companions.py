"""The text files next to the weights of a model folder: tokenizer, chat template, stop tokens.

Their text is kept verbatim when a loaded model is saved. Other programs then read the same settings, including those
that openmimo ignores, such as sampling defaults and the tokenizer class.
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
        """The same files with the context length of the tokenizer set to `tokens`, if it states one."""
        text = self.files.get(_TOKENIZER_CONFIG)
        values = {} if text is None else parse_json(text, _TOKENIZER_CONFIG)
        if "model_max_length" not in values:
            return self
        text = json.dumps({**values, "model_max_length": tokens}, indent=2, ensure_ascii=False) + "\n"
        return Companions({**self.files, _TOKENIZER_CONFIG: text})

    def write(self, folder: Path) -> None:
        """Writes the files into `folder`, and removes existing companions of another model."""
        for name in companion_names(folder):
            if name not in self.files:
                (folder / name).unlink()
        for name, text in self.files.items():
            write_text_atomic(folder / name, text)


def companion_names(folder: Path) -> list[str]:
    """The names of the companions in a folder, relative to it."""
    subfolder = folder / _TEMPLATES
    templates = [] if subfolder.is_symlink() else sorted(subfolder.glob("*.jinja"))
    return [name for name in _NAMES if (folder / name).exists()] + [f"{_TEMPLATES}/{path.name}" for path in templates]


def read_companions(folder: Path, error: type[UserError] = CheckpointError) -> Companions:
    """Reads the companions of a model folder. Raises `error` for one that is not a readable text file in it."""
    files = {}
    for name in companion_names(folder):
        path = file_in_folder((folder / name).parent, Path(name).name, error)
        assert path is not None, "companion_names lists existing files"
        files[name] = read_text(path, error)
    return Companions(files)
