"""The Python that runs inside the jail: one that the user of the jail can read."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from openmimo.runtime.sandbox.records import SandboxUnavailableError


@dataclass(frozen=True)
class Interpreter:
    """An executable, and the folder of its standard library, which the jail shows read-only at the same path."""

    executable: str
    prefix: str


def find_interpreter() -> Interpreter:
    """Return the base Python of this process, or the system's Python if only root can read the former.

    Raises:
        SandboxUnavailableError: There is none.
    """
    base_python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    system = [Path(found) for found in ("/usr/bin/python3", "/usr/local/bin/python3") if shutil.which(found)]
    candidates = [Interpreter(str(base_python), sys.base_prefix)]
    candidates += [Interpreter(str(path.resolve()), str(path.parents[1])) for path in system]
    for candidate in candidates:
        path = Path(candidate.executable)
        narrow = Path(candidate.prefix).resolve() not in (Path("/"), Path.home().resolve(), *Path.home().parents)
        if path.exists() and narrow and (os.geteuid() != 0 or readable_by_all(path)):
            return candidate
    raise SandboxUnavailableError(
        f"Model-written code runs as an unprivileged user, who cannot read the Python at {base_python}, and there is "
        "none at /usr/bin/python3. Install the system's Python, e.g. with apt-get install python3."
    )


def readable_by_all(path: Path) -> bool:
    """Return whether any user can reach and read `path`."""
    resolved = path.resolve()
    return bool(resolved.stat().st_mode & 0o004) and all(parent.stat().st_mode & 0o001 for parent in resolved.parents)
