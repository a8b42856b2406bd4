"""The folders of jails on the host. Each is locked by its process, so that leftovers can be recognized.

The kernel releases a lock when the last process that holds it exits for any reason. A folder that can be locked is
therefore unused.
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
    """Create a folder. Returns it with the open descriptor that locks it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = lock_of(path)
        if lock is not None and path.exists():
            return path, lock
        if lock is not None:  # a sweep removed the folder before it was locked
            os.close(lock)


def lock_of(path: Path) -> int | None:
    """Return a descriptor that locks a folder; None if it is in use, absent, or owned by another user."""
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
    """Remove a folder with its content."""
    with contextlib.suppress(OSError, RecursionError):
        shutil.rmtree(path)
    if path.exists():  # folders without permissions, or thousands of levels deep
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", path], check=False, stderr=subprocess.DEVNULL)


def sweep() -> None:
    """Remove what killed processes left behind: unlocked folders of this user, and their control groups."""
    folder = Path(tempfile.gettempdir())
    for path in folder.glob(PREFIX + "*"):
        lock = lock_of(path)
        if lock is not None:
            cgroup.end(path.name)
            remove(path)
            os.close(lock)
    cgroup.sweep(PREFIX, lambda name: (folder / name).exists())
