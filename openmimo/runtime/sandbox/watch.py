"""What a running jail uses, seen from outside: memory of its processes, bytes of its files, processes left behind."""

import contextlib
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

MOST_FILES = 10_000  # a working folder with more counts as full,
LONGEST_PATH = 1024  # as does one with a longer path, since every look at deep folders walks all the way down


def process_tree(pid: int) -> Iterator[int]:
    """`pid` and everything under it. Inside a process namespace orphans stay under its first process."""
    waiting = [pid]
    while waiting:
        pid = waiting.pop()
        yield pid
        with contextlib.suppress(OSError):
            for task in os.scandir(f"/proc/{pid}/task"):
                waiting += [int(child) for child in Path(task.path, "children").read_text().split()]


def exceeds_memory(pid: int, limit_bytes: int) -> bool:
    """Whether the tree of `pid` holds more than `limit_bytes`. The cheap count first: it is never the smaller one."""
    pids = list(process_tree(pid))
    if sum(map(_resident_bytes, pids)) <= limit_bytes:
        return False
    return sum(map(_private_bytes, pids)) > limit_bytes


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _private_bytes(pid: int) -> int:
    """The proportional set size: a page shared by n processes is an n-th of a page."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return _resident_bytes(pid)


def exceeds_disk(folder: Path, limit_bytes: int) -> bool:
    """Whether the files in `folder` take more than `limit_bytes`, or are too many, too deep or too hidden to count."""
    total = files = 0
    waiting = [str(folder)]
    while waiting:
        try:
            for path, status in _entries(waiting.pop()):
                total += status.st_blocks * 512
                files += 1
                if total > limit_bytes or files > MOST_FILES or len(path) > LONGEST_PATH:
                    return True
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(path)
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


def _entries(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """What is in a folder; what vanishes meanwhile is left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield entry.path, status


def kill_marked(marker: str) -> None:
    """Kills every process that was started with `marker` in its environment, wherever it has gone since."""
    for _ in range(5):
        found = False
        for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
            with contextlib.suppress(OSError):
                if marker.encode() in Path(f"/proc/{name}/environ").read_bytes():
                    os.kill(int(name), signal.SIGKILL)
                    found = True
        if not found:
            return
