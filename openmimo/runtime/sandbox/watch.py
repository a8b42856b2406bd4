"""The resource usage of a running jail, measured from outside: memory of its processes, bytes and number of files.

These checks apply where the kernel cannot enforce the limits (by control groups and small file systems). They run
periodically, so usage can exceed a limit between two checks.
"""

import contextlib
import os
import signal
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from openmimo.runtime.sandbox.records import MAX_FILES

MAX_PATH = 1024  # a working folder with a longer path counts as full, because every check walks to the bottom
MAX_MAPPINGS_BYTES = 2**20  # of /proc/PID/maps; each mapping is kernel memory
SOCKET_BYTES = 212_992  # the default buffer of a socket, which a jail cannot raise
ENDING_SECONDS = 5.0


def process_tree(pid: int) -> Iterator[int]:
    """Yield `pid` and its descendants. In a process namespace, orphans become children of its first process."""
    waiting = [pid]
    while waiting:
        pid = waiting.pop()
        yield pid
        with contextlib.suppress(OSError):
            for task in os.scandir(f"/proc/{pid}/task"):
                waiting += [int(child) for child in Path(task.path, "children").read_text().split()]


def end_tree(pid: int) -> None:
    """Kill the descendants of `pid`, which adopts orphans, and then `pid` itself."""
    deadline = time.monotonic() + ENDING_SECONDS
    while (below := list(process_tree(pid))[1:]) and time.monotonic() < deadline:
        for child in below:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def exceeds_memory(pid: int, limit_bytes: int) -> bool:
    """Return whether the process tree of `pid` uses more than `limit_bytes`. The first estimate is an upper bound."""
    pids = list(process_tree(pid))
    if any(map(_hides_memory, pids)):
        return True
    sockets = SOCKET_BYTES * len({link for pid in pids for link in _descriptors(pid) if link.startswith("socket:")})
    if sockets + sum(map(_resident_bytes, pids)) <= limit_bytes:
        return False
    return sockets + sum(map(_private_bytes, pids)) > limit_bytes


def _hides_memory(pid: int) -> bool:
    """Return whether a process maps shared memory without a file; its pages persist when all but one are unmapped."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
        text = file.read(MAX_MAPPINGS_BYTES)
        return len(text) == MAX_MAPPINGS_BYTES or b"/dev/zero (deleted)\n" in text
    return False


def _descriptors(pid: int) -> Iterator[str]:
    """Yield the targets of a process's open descriptors."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(entry.path)


def _resident_bytes(pid: int) -> int:
    return sum(_kilobytes(f"/proc/{pid}/status", ("VmRSS:", "VmPTE:", "VmSwap:"))) * 1024


def _private_bytes(pid: int) -> int:
    """Return the proportional set size plus page tables: a page shared by n processes counts 1/n."""
    proportional = _kilobytes(f"/proc/{pid}/smaps_rollup", ("Pss:", "SwapPss:"))
    if not proportional:
        return _resident_bytes(pid)
    return sum(proportional + _kilobytes(f"/proc/{pid}/status", ("VmPTE:",))) * 1024


def _kilobytes(path: str, names: tuple[str, ...]) -> list[int]:
    """Return the numbers on the lines of a /proc file that start with `names`; none if the file is absent."""
    with contextlib.suppress(OSError):
        return [int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(names)]
    return []


def exceeds_files(stores: Iterable[int]) -> bool:
    """Return whether one of these file systems holds more than MAX_FILES. The kernel limits their bytes."""
    return any(system.f_files - system.f_ffree > MAX_FILES for system in map(os.fstatvfs, stores))


def exceeds_disk(folder: Path, limit_bytes: int, pid: int | None = None) -> bool:
    """Return whether files exceed a limit.

    Counts the files in `folder`, and the deleted files that the process tree of `pid` has open or mapped. More than
    MAX_FILES files, paths longer than MAX_PATH and folders that cannot be read also exceed the limit.
    """
    total = _nameless_bytes(pid) if pid else 0
    files = 0
    waiting = [str(folder)]
    while waiting and total <= limit_bytes:
        try:
            for path, status in _entries(waiting.pop()):
                total += status.st_blocks * 512
                files += 1
                if total > limit_bytes or files > MAX_FILES or len(path) > MAX_PATH:
                    return True
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(path)
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return total > limit_bytes


def _nameless_bytes(pid: int) -> int:
    """Return the bytes of the deleted files that a process tree has open or mapped."""
    bytes_by_inode: dict[int, int] = {}
    for process in process_tree(pid):
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{process}/fd"):
                _count(bytes_by_inode, entry.path)
        with contextlib.suppress(OSError), open(f"/proc/{process}/maps", "rb") as file:
            for line in file.read(MAX_MAPPINGS_BYTES).splitlines():
                if line.endswith(b" (deleted)") and not line.endswith(b"/dev/zero (deleted)"):
                    _count_mapping(bytes_by_inode, process, line.decode(errors="replace"))
    return sum(bytes_by_inode.values())


def _count(bytes_by_inode: dict[int, int], path: str) -> bool:
    """Add a deleted file to `bytes_by_inode`, by its inode. Returns False if the file cannot be examined."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
            bytes_by_inode[status.st_ino] = status.st_blocks * 512
        return True
    return False


def _count_mapping(bytes_by_inode: dict[int, int], process: int, line: str) -> None:
    """Add a mapped file to `bytes_by_inode`: its size for root, the mapped length for other users."""
    span, _, offset, _, inode = line.split()[:5]
    if not _count(bytes_by_inode, f"/proc/{process}/map_files/{span}"):
        start, end = (int(part, 16) for part in span.split("-"))
        bytes_by_inode[int(inode)] = max(bytes_by_inode.get(int(inode), 0), int(offset, 16) + end - start)


def _entries(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the entries of a folder, without those that vanish during the walk."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield entry.path, status
