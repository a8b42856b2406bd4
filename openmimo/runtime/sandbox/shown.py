"""The files of the host that a jail shows: the interpreter, and the programs and libraries of the system.

Python packages are hidden in every folder, because this package may be installed system-wide with the answers of its
tasks.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from openmimo.runtime.sandbox.interpreter import Interpreter

TOP_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
PROGRAMS = tuple(f"/usr/{name}" for name in (*TOP_FOLDERS, "libexec"))
SHARED = tuple(f"/usr/share/{name}" for name in ("zoneinfo", "perl", "perl5", "awk"))
# The library cache, and the targets of links such as /usr/bin/awk. Nothing else of /etc is shown.
SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives")
OWN_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Shown:
    """The plan of a jail's file system.

    Attributes:
        paths: Folders and files that are shown read-only at the same path.
        links: Symbolic links, path to target.
        hidden: Folders under `paths` that are shown empty.
    """

    paths: tuple[str, ...]
    links: dict[str, str]
    hidden: tuple[str, ...]


def what_is_shown(interpreter: Interpreter, others: tuple[Path, ...] = ()) -> Shown:
    """Return the plan for this interpreter. `others` are additional folders to show, Python packages included."""
    paths: list[Path] = []
    links: dict[str, str] = {}
    for path in (Path("/") / name for name in TOP_FOLDERS):
        if path.is_symlink():
            links[str(path)] = os.readlink(path)
        elif path.is_dir():
            paths.append(path)
    paths += [path for path in map(Path, (*PROGRAMS, *SHARED, *SETTINGS)) if path.exists() and not path.is_symlink()]
    links |= {str(path): os.readlink(path) for path in map(Path, PROGRAMS) if path.is_symlink()}
    paths += _of_interpreter(interpreter, paths)
    hidden = [path for path in _packages(paths) if not any(other.is_relative_to(path) for other in others)]
    paths += [other for other in others if not _is_under(other, paths)]
    return Shown(tuple(map(str, paths)), links, tuple(map(str, hidden)))


def _of_interpreter(interpreter: Interpreter, shown: list[Path]) -> list[Path]:
    """Return the executable under its usual names and the libraries under its prefix, unless they are already shown."""
    executable, prefix = Path(interpreter.executable), Path(interpreter.prefix)
    names = [executable, *(executable.with_name(name) for name in ("python3", "python"))]
    candidates = dict.fromkeys([*names, prefix / "lib", prefix / "lib64"])
    return [path for path in candidates if path.exists() and not _is_under(path, shown)]


def _packages(shown: list[Path]) -> list[Path]:
    """Return the folders of installed Python packages among the shown paths, and this package."""
    found: list[Path] = []
    for folder in (path for path in shown if path.name in ("lib", "lib64") and path.is_dir()):
        found += [*folder.glob("python*/site-packages"), *folder.glob("python*/dist-packages")]
    if _is_under(OWN_PACKAGE, shown) and not _is_under(OWN_PACKAGE, found):
        found.append(OWN_PACKAGE)
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _is_under(path: Path, folders: list[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)
