"""Control groups: kernel limits on the memory and the number of processes of a whole jail.

Control groups count memory that is invisible per process, such as socket buffers and files in memory. The group of a
jail is a child of this process's group, or a sibling if that group has no limit, so that the limits of this process
still hold. Many machines and most containers permit neither; the jail then has only its other limits.
"""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONTROLLERS = ("memory", "pids")
REMOVAL_SECONDS = 2.0  # killed processes leave their group with a short delay


@dataclass(frozen=True)
class Parent:
    """A folder in which groups of a controller can be created, and the version of its interface."""

    folder: Path
    version: int


class Group:
    """The control groups of one jail: one per controller, or one folder for both in version 2."""

    def __init__(self, name: str, memory_bytes: int, processes: int):
        self.folders: dict[Path, int] = {}
        self.memory: Path | None = None
        try:
            for controller, parent in parents().items():
                folder = parent.folder / name
                folder.mkdir(exist_ok=folder in self.folders)
                self.folders[folder] = parent.version
                if controller == "pids":
                    (folder / "pids.max").write_text(str(processes))
                else:
                    _limit_memory(folder, parent.version, memory_bytes)
                    self.memory = folder
        except BaseException:
            self.close()
            raise

    def add(self, pids: list[int]) -> None:
        """Move processes into the groups. Their later children are members as well."""
        for folder in self.folders:
            for pid in pids:
                (folder / "cgroup.procs").write_text(str(pid))

    def ran_out_of_memory(self) -> bool:
        """Return whether the kernel has killed a process of the group for exceeding the memory limit."""
        if self.memory is None:
            return False
        version = self.folders[self.memory]
        text = (self.memory / ("memory.events" if version == 2 else "memory.oom_control")).read_text()
        return any(line.startswith("oom_kill ") and int(line.split()[1]) > 0 for line in text.splitlines())

    def close(self) -> None:
        """Kill the remaining processes and remove the groups."""
        for folder in self.folders:
            _end(folder)
        self.folders = {}


def _end(folder: Path) -> None:
    """Kill the processes of a group and remove it."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    while not _remove(folder) and time.monotonic() < deadline:
        for pid in _pids(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _limit_memory(folder: Path, version: int, limit: int) -> None:
    """Set the memory limit and permit no swap."""
    if version == 2:
        settings = {"memory.max": limit, "memory.swap.max": 0, "memory.oom.group": 1}
    else:
        settings = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit, "memory.swappiness": 0}
    for name, value in settings.items():
        if (folder / name).exists():
            (folder / name).write_text(str(value))


def _pids(folder: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    return []


def _remove(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        try:
            folder.rmdir()
        except OSError:
            return False
    return True


def end(name: str) -> None:
    """Kill the processes of a jail whose owner has exited, and remove its groups."""
    for parent in set(parents().values()):
        _end(parent.folder / name)


def sweep(prefix: str, is_alive: Callable[[str], bool]) -> None:
    """Remove empty groups with this prefix, unless `is_alive(name)`. Others may belong to another temporary folder."""
    for parent in set(parents().values()):
        for folder in parent.folder.glob(prefix + "*"):
            if not is_alive(folder.name):
                _remove(folder)


@functools.cache
def parents() -> dict[str, Parent]:
    """Return the parent of new groups by controller; empty if this process may create none. Cached per process."""
    found = {}
    for controller in CONTROLLERS:
        for parent in (_unified(controller), _legacy(controller)):
            if parent and os.access(parent.folder, os.W_OK):
                found[controller] = parent
                break
    return found


def _unified(controller: str) -> Parent | None:
    """Return, for version 2, the group of this process, or its parent if the group has no limit."""
    group_folder = _own_folder("0::", "cgroup2", "")
    if group_folder is None:
        return None
    free = _text(group_folder / f"{controller}.max") == "max"
    for folder in (group_folder, group_folder.parent) if free else (group_folder,):
        if controller in _text(folder / "cgroup.subtree_control").split():
            return Parent(folder, 2)
    return None


def _legacy(controller: str) -> Parent | None:
    """Return, for version 1, the group of this process."""
    group_folder = _own_folder(f":{controller}:", "cgroup", controller)
    return Parent(group_folder, 1) if group_folder else None


def _own_folder(mark: str, kind: str, option: str) -> Path | None:
    """Return the folder of this process's group in the file system of that kind, or None."""
    lines = [line for line in _text(Path("/proc/self/cgroup")).splitlines() if mark in line]
    for mount in _text(Path("/proc/self/mountinfo")).splitlines():
        location, _, system = mount.partition(" - ")
        root, point = location.split()[3:5]
        name, _, options = system.split(maxsplit=2)
        if lines and name == kind and (not option or option in options.split(",")):
            path = lines[0].split(":", 2)[2]
            folder = Path(point) / os.path.relpath(path, root)
            return folder if Path(path).is_relative_to(root) and folder.is_dir() else None
    return None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
