"""The working folder of a jail, seen from the host: files go in and out, and no link of the program's leads outside."""

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from openmimo.core.errors import UserError
from openmimo.runtime.sandbox.interpreter import Interpreter
from openmimo.runtime.sandbox.records import SandboxResult
from openmimo.runtime.sandbox.tiers import NOBODY, Place

Program = str | Sequence[str]


class WorkspaceError(UserError):
    """A path leaves the working folder, or is no plain file in it."""


class Workspace:
    """A folder whose files persist from one jailed command to the next. Use it as a context manager, or close it.

    `start(place)` starts a jail around it. shown: folders of the host that the jail may read. Not for several threads.
    """

    def __init__(self, start: Callable, interpreter: Interpreter, shown: tuple[Path, ...] = ()):
        self._start = start
        self._home = Path(tempfile.mkdtemp(prefix="openmimo-jail-"))
        self.place = Place(self._home / "work", self._home / "root", interpreter, shown)
        for folder in (self.place.work, self.place.root):
            folder.mkdir(mode=0o700)
        if os.geteuid() == 0:
            for folder in (self._home, self.place.work, self.place.root):
                os.chown(folder, NOBODY, NOBODY)

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def run(self, program: Program, stdin: bytes = b"") -> SandboxResult:
        """Runs Python source (a string) or a command (a list) in a jail of its own, in this folder.

        Processes that it leaves in the background end with it.
        """
        job = job_of(program)
        jail = self._start(self.place)
        jail.wait_until_ready()
        return jail.run(job, stdin)

    def read(self, path: str, limit_bytes: int = 2**24) -> bytes:
        """A file's content, up to `limit_bytes`. Raises WorkspaceError for links, folders, pipes and paths outside."""
        with self._folder_of(path) as (folder, name):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(_open(name, flags, folder, path), "rb") as file:
                return file.read(limit_bytes)

    def write(self, path: str, content: bytes | str) -> None:
        """Writes a file, and the folders above it. Raises WorkspaceError where a link or a pipe is in the way."""
        content = content.encode() if isinstance(content, str) else content
        with self._folder_of(path, create=True) as (folder, name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(_open(name, flags, folder, path), "wb") as file:
                file.truncate()
                file.write(content)
                _give_away(file.fileno())

    def write_all(self, files: Mapping[str, bytes | str]) -> None:
        """Writes several files, by their paths."""
        for path, content in files.items():
            self.write(path, content)

    def close(self) -> None:
        """Removes the folder."""
        with contextlib.suppress(OSError, RecursionError):
            shutil.rmtree(self._home)
        if self._home.exists():  # folders without permissions, or thousands of levels deep
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, "--", self._home], check=False, stderr=subprocess.DEVNULL)

    @contextlib.contextmanager
    def _folder_of(self, path: str, create: bool = False) -> Iterator[tuple[int, str]]:
        """An open folder and a name in it, reached one real folder at a time."""
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\0" in path:
            raise WorkspaceError(f"{path!r} is not a path inside the working folder; give a relative one without '..'.")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.open(self.place.work, flags)
        try:
            for part in parts[:-1]:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=folder)
                below = _open(part, flags, folder, path)
                os.close(folder)
                folder = below
                if create:
                    _give_away(folder)
            yield folder, parts[-1]
        finally:
            os.close(folder)


def job_of(program: Program) -> dict:
    """What a jail is told to do: run Python source, or a command with its arguments."""
    if isinstance(program, str):
        return {"source": program}
    if not program or not all(isinstance(word, str) and "\0" not in word for word in program):
        raise UserError(f"a program is Python source (a string) or a list of words, not {program!r}.")
    return {"argv": list(program)}


def _open(name: str, flags: int, folder: int, path: str) -> int:
    try:
        descriptor = os.open(name, flags, 0o644, dir_fd=folder)
    except OSError as error:
        raise WorkspaceError(f"{path!r} cannot be opened in the working folder: {error.strerror}.") from error
    if not flags & os.O_DIRECTORY and not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WorkspaceError(f"{path!r} is not a plain file.")
    return descriptor


def _give_away(descriptor: int) -> None:
    """As root: to the user that the jail runs as."""
    if os.geteuid() == 0:
        os.fchown(descriptor, NOBODY, NOBODY)
