"""The working folder of a jail on the host. Reads and writes never follow a link of the program to the outside."""

import contextlib
import ctypes
import os
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from openmimo.core.errors import UserError
from openmimo.runtime.sandbox import folders
from openmimo.runtime.sandbox.interpreter import Interpreter
from openmimo.runtime.sandbox.jail import Jail
from openmimo.runtime.sandbox.records import SandboxResult
from openmimo.runtime.sandbox.tiers import UNPRIVILEGED_ID, JailPaths

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
WRITE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
Program = str | Sequence[str]


class WorkspaceError(UserError):
    """A path leads outside the working folder, or is not a plain file."""


class Workspace:
    """A folder whose files persist from one jailed command to the next. Use it as a context manager, or close it.

    Files are on the disk until the first command. Each jail then has a private folder in memory, into which the files
    of the previous one are copied, and which stays open here after its jail ends. Not thread-safe.

    Args:
        start: Starts a jail around the folder.
        interpreter: The Python of the jail.
        shown: Folders of the host that the jail may read.
    """

    def __init__(self, start: Callable[[JailPaths], Jail], interpreter: Interpreter, shown: tuple[Path, ...] = ()):
        self._start = start
        self._home, self._lock = folders.make_home()
        self._home.chmod(0o711)
        self.paths = JailPaths(self._home / "work", self._home / "root", interpreter, shown)
        for folder in (self.paths.work, self.paths.root):
            folder.mkdir(mode=0o700)
            if os.geteuid() == 0:
                os.chown(folder, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
        self._folder = os.open(self.paths.work, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def run(self, program: Program, stdin: bytes = b"") -> SandboxResult:
        """Run Python source (a string) or a command (a list) in a new jail, in this folder.

        Its background processes end with it.
        """
        job = job_of(program)
        return self.start().run(job, stdin)

    def start(self) -> Jail:
        """Start a jail with the files of this folder.

        Raises:
            JailError: The jail does not start.
            WorkspaceError: The files do not fit.
        """
        jail = self._start(self.paths)
        jail.wait_until_ready()
        if jail.work is not None:
            try:
                carry(self._folder, jail.work)
            except WorkspaceError:
                jail.kill()
                raise
            os.close(self._folder)
            self._folder = os.dup(jail.work)
        return jail

    def read(self, path: str, limit_bytes: int = 2**24) -> bytes:
        """Read up to `limit_bytes` bytes of a plain file inside the folder. Raises WorkspaceError for other paths."""
        with self._folder_of(path) as (folder, name), os.fdopen(_open(name, READ, folder, path), "rb") as file:
            return file.read(limit_bytes)

    def write(self, path: str, content: bytes | str) -> None:
        """Write a file and its parent folders. Raises WorkspaceError if a part of the path is a link or a pipe."""
        content = content.encode() if isinstance(content, str) else content
        with self._folder_of(path, create=True) as (folder, name):
            descriptor = _open(name, WRITE, folder, path)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.truncate()
                    file.write(content)
            except OSError as error:
                raise WorkspaceError(f"{path!r} cannot be written in the working folder: {error.strerror}.") from error

    def write_all(self, files: Mapping[str, bytes | str]) -> None:
        """Write several files, given by path."""
        for path, content in files.items():
            self.write(path, content)

    def close(self) -> None:
        """Remove the folder."""
        if self._folder < 0:
            return
        os.close(self._folder)
        self._folder = -1
        folders.remove(self._home)
        os.close(self._lock)

    @contextlib.contextmanager
    def _folder_of(self, path: str, create: bool = False) -> Iterator[tuple[int, str]]:
        """Open the parent folder of a path, one real folder at a time. Yields its descriptor and the file name."""
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\0" in path:
            raise WorkspaceError(f"{path!r} is not a path inside the working folder; give a relative one without '..'.")
        with _as_jailed_user():
            folder = os.dup(self._folder)
            try:
                for part in parts[:-1]:
                    if create:
                        _make_folder(part, folder, path)
                    below = _open(part, FOLDER, folder, path)
                    os.close(folder)
                    folder = below
                yield folder, parts[-1]
            finally:
                os.close(folder)


@contextlib.contextmanager
def _as_jailed_user() -> Iterator[None]:
    """As root, limits this thread's file permissions to those of the jail's user.

    The private folder of a jail has no other user, and a link of the program then reaches no more than the program.
    """
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.setfsgid(UNPRIVILEGED_ID)
    libc.setfsuid(UNPRIVILEGED_ID)
    try:
        yield
    finally:
        libc.setfsuid(0)
        libc.setfsgid(os.getegid())


def job_of(program: Program) -> dict:
    """Return the job record of a program: Python source, or a command with its arguments."""
    if isinstance(program, str):
        return {"source": program}
    if not program or not all(isinstance(word, str) and "\0" not in word for word in program):
        raise UserError(f"a program is Python source (a string) or a list of words, not {program!r}.")
    return {"argv": list(program)}


def carry(source: int, target: int) -> None:
    """Copy the content of an open folder into an empty one. No program may be using either.

    Raises:
        WorkspaceError: An entry cannot be copied.
    """
    if not os.listdir(source):
        return
    command = ["cp", "-a", "--", f"/proc/self/fd/{source}/.", f"/proc/self/fd/{target}/"]
    unprivileged = UNPRIVILEGED_ID if os.geteuid() == 0 else None
    done = subprocess.run(
        command, pass_fds=(source, target), capture_output=True, check=False,
        user=unprivileged, group=unprivileged, extra_groups=None if unprivileged is None else [],
    )  # fmt: skip
    if done.returncode:
        first_line = done.stderr[:300].decode(errors="replace").splitlines()[:1]
        raise WorkspaceError(
            f"the files of the working folder cannot be copied into a new jail: {' '.join(first_line)}."
        )


def _make_folder(name: str, folder: int, path: str) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=folder)
    except FileExistsError:
        pass
    except OSError as error:
        raise WorkspaceError(f"{path!r} cannot be made in the working folder: {error.strerror}.") from error


def _open(name: str, flags: int, folder: int, path: str) -> int:
    try:
        descriptor = os.open(name, flags, 0o644, dir_fd=folder)
    except OSError as error:
        raise WorkspaceError(f"{path!r} cannot be opened in the working folder: {error.strerror}.") from error
    if not flags & os.O_DIRECTORY and not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WorkspaceError(f"{path!r} is not a plain file.")
    return descriptor
