"""The folders of jails on the host: each is locked by the process that made it, so that leftovers can be recognized.

The kernel drops a lock with the last process that holds it, however that ended. Hence a folder that can be locked is in
use by no process.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from openmimo.runtime.sandbox import cgroup

PREFIX = "openmimo-jail-"


def make_home() -> tuple[Path, int]:
    """A new folder, and the open descriptor that locks it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = lock_of(path)
        if lock is not None and path.exists():
            return path, lock
        if lock is not None:  # a sweep came first
            os.close(lock)


def lock_of(path: Path) -> int | None:
    """A descriptor that locks a folder of this user's, or None if it is in use, gone, or another's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    os.close(descriptor)
    return None


def remove(path: Path) -> None:
    """Removes a folder with all that is in it."""
    with contextlib.suppress(OSError, RecursionError):
        shutil.rmtree(path)
    if path.exists():  # folders without permissions, or thousands of levels deep
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", path], check=False, stderr=subprocess.DEVNULL)


def sweep() -> None:
    """Removes what killed processes have left: folders of this user's that nothing locks, and their groups."""
    folder = Path(tempfile.gettempdir())
    for path in folder.glob(PREFIX + "*"):
        lock = lock_of(path)
        if lock is not None:
            cgroup.end(path.name)
            remove(path)
            os.close(lock)
    cgroup.sweep(PREFIX, lambda name: (folder / name).exists())
