"""Builds the root folder of an unshare jail inside its new namespaces, then executes the first program of the jail.

It runs as process 1 and as root of the jail's user namespace, from its source text, so it imports the standard library
only. Its arguments are a plan as JSON (see `tiers.py`) and a command. It drops every capability before the command.
"""

import ctypes
import json
import os
import sys

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC = 1, 2, 4, 8, 32, 4096, 16384
MNT_DETACH = 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    """Raise OSError if a call of the C library failed."""
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source, target, kind, flags, options=""):
    """Call mount(2). Raises OSError if it fails."""
    texts = [text.encode() if text else None for text in (source, target, kind)]
    check(libc.mount(*texts, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def show(source, root):
    """Mount a folder or file of the host read-only, with its submounts, at the same path under `root`."""
    target = root + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    mount(source, target, None, BIND | REC)
    attributes = (ctypes.c_uint64 * 4)(RDONLY | NOSUID | NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, size):  # before Linux 5.12
        noexec = os.statvfs(target).f_flag & NOEXEC
        mount(None, target, None, BIND | REMOUNT | RDONLY | NOSUID | NODEV | noexec)


def store(folder, options):
    """Create an empty file system in memory with the limits in `options`."""
    os.makedirs(folder, exist_ok=True)
    mount("jail", folder, "tmpfs", NOSUID | NODEV, options)


def build(plan):
    """Create the root folder in a small file system in memory, and enter it."""
    root = plan["root"]
    mount("jail", root, "tmpfs", NOSUID | NODEV, "size=1m,nr_inodes=2048,mode=755")
    for path in plan["stores"]:
        store(root + path, f"size={plan['size']},nr_inodes={plan['files']},mode=1777")
    for path in plan["shown"]:
        show(path, root)
    for path in plan["hidden"]:
        mount("jail", root + path, "tmpfs", RDONLY | NOSUID | NODEV, "size=4k,nr_inodes=1,mode=755")
    for path in plan["devices"]:
        open(root + path, "a").close()
        mount(path, root + path, None, BIND)
    for path, target in plan["links"].items():
        os.symlink(target, root + path)
    os.makedirs(root + "/proc")
    try:
        mount("proc", root + "/proc", "proc", NOSUID | NODEV | NOEXEC, "subset=pid")
    except OSError:  # before Linux 5.8
        mount("proc", root + "/proc", "proc", NOSUID | NODEV | NOEXEC)
    enter(root)


def enter(root):
    """Make `root` the root folder and detach the old one."""
    os.chdir(root)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount2")
    mount(None, "/", None, BIND | REMOUNT | RDONLY | NOSUID | NODEV)
    libc.sethostname(b"jail", ctypes.c_size_t(4))


def drop_capabilities():
    """Empty the bounding set: the next program has no capability, although its user is root of the namespace."""
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) == 0:
        capability += 1
    one = ctypes.c_ulong(1)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, one, 0, 0, 0) or capability < 38, "dropping capabilities")


build(json.loads(sys.argv[1]))
drop_capabilities()
os.chdir("/workspace")
os.execv(sys.argv[2], sys.argv[2:])
