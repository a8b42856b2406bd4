"""Which of the host's files a jail shows: the interpreter, the system's programs and libraries, and nothing else.

Packages of Python are hidden wherever they lie, since this package itself may be installed for the whole system, with
the answers of its tasks.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from openmimo.runtime.sandbox.interpreter import Interpreter

TOP_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
PROGRAMS = tuple(f"/usr/{name}" for name in (*TOP_FOLDERS, "libexec"))
SHARED = tuple(f"/usr/share/{name}" for name in ("zoneinfo", "perl", "perl5", "awk"))
# The order of libraries, and the targets of links such as /usr/bin/awk. Nothing else of /etc is shown.
SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives")
OWN_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Shown:
    """paths: folders and files, shown read-only at the same place. links: a link's path to its target. hidden: folders
    under `paths` that are shown empty."""

    paths: tuple[str, ...]
    links: dict[str, str]
    hidden: tuple[str, ...]


def what_is_shown(interpreter: Interpreter, others: tuple[Path, ...] = ()) -> Shown:
    """What a jail for this interpreter shows; `others` are folders to show besides, packages of Python or not."""
    paths, links = [], {}
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
    """The executable under its usual names and the libraries under its prefix, where they are not shown yet."""
    executable, prefix = Path(interpreter.executable), Path(interpreter.prefix)
    wanted = [executable, *(executable.with_name(name) for name in ("python3", "python")), prefix / "lib"]
    wanted.append(prefix / "lib64")
    return [path for path in dict.fromkeys(wanted) if path.exists() and not _is_under(path, shown)]


def _packages(shown: list[Path]) -> list[Path]:
    """Folders of installed Python packages in what is shown, and this package."""
    found = []
    for folder in (path for path in shown if path.name in ("lib", "lib64") and path.is_dir()):
        found += [*folder.glob("python*/site-packages"), *folder.glob("python*/dist-packages")]
    if _is_under(OWN_PACKAGE, shown) and not _is_under(OWN_PACKAGE, found):
        found.append(OWN_PACKAGE)
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _is_under(path: Path, folders: list[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)
