"""The Python files of the interpreter's standard library: about 12 MB of code and prose, available offline."""

import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openmimo.data.source import TextSource, read_text

# Tests are repetitive and contain intentionally malformed files; installed packages differ between machines.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Options:
    """No settings."""


def documents(options: Options) -> Iterator[str]:
    """Yield one document per file, in the order of the paths."""
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield read_text(Path(folder) / name)


def fingerprint(options: Options) -> str:
    """Return the version of the interpreter and the path of its library, which is assumed to be unmodified."""
    return f"{sys.version} {sysconfig.get_path('stdlib')}"


PLUGIN = TextSource(
    describe="the .py files of the Python standard library (about 12 MB, no download)",
    options=Options,
    documents=documents,
    fingerprint=fingerprint,
)
