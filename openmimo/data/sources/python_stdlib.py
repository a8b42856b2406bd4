"""The Python files of the running interpreter's standard library: about 12 MB of code and prose, always at hand."""

import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openmimo.data.source import TextSource, read_text

# Tests repeat themselves and hold files that are broken on purpose; installed packages differ between machines.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Options:
    """No settings."""


def documents(options: Options) -> Iterator[str]:
    """One document a file, in the order of the paths."""
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield read_text(Path(folder) / name)


def fingerprint(options: Options) -> str:
    """The exact interpreter; its library is not expected to be edited."""
    return f"{sys.version} {sysconfig.get_path('stdlib')}"


PLUGIN = TextSource(
    describe="the Python standard library's own .py files (about 12 MB, no download)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
