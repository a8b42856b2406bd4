"""Runs inside a jail, attempts to escape, and reports the attempts that succeed.

The settings are JSON on stdin:
    isolates: Whether the process is in a jail; otherwise, it has resource limits only.
    port, abstract: Listeners of the host, for a jail.
    files, folders: Files to read and folders to write in, for a jail.
    processes, file_bytes: The limits.
    calls: Numbers of the system calls that must be refused, by name.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import sys
import time

VSOCK, NETLINK = 40, 16


def network(port):
    """Connect to the host that started the jail."""
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


def abstract(name):
    """Connect to an abstract socket of the host."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + name)
        return True


def family(number):
    """Open a socket of a family that namespaces do not isolate."""
    with socket.socket(number, socket.SOCK_DGRAM if number == NETLINK else socket.SOCK_STREAM):
        return True


def call(number):
    """Make a system call without arguments. True unless the kernel refuses the call itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, 0, 0, 0, 0, 0, 0)
    return result >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS)


def nameless(size):
    """Write four unlinked files of `size` bytes."""
    files = []
    for number in range(4):
        path = f"nameless-{number}"
        files.append(open(path, "wb", buffering=0))  # noqa: SIM115
        os.unlink(path)
        if files[-1].write(bytes(size)) < size:
            return False
    return True


def read(path):
    """Read a file of the host."""
    with open(path, "rb") as file:
        return bool(file.read(1))


def write(folder):
    """Create a file outside the working folder."""
    path = os.path.join(folder, f"openmimo-probe-{os.getpid()}")
    with open(path, "wb"):
        os.unlink(path)
        return True


def processes(limit):
    """Start processes until the kernel refuses, or there are more than `limit`."""
    children: list[int] = []
    try:
        while len(children) <= limit:
            pid = os.fork()
            if pid == 0:
                time.sleep(5)
                os._exit(0)
            children.append(pid)
        return True
    except OSError:
        return False
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def succeeds(attempt, target):
    """Return whether an attempt succeeded."""
    try:
        return attempt(target)
    except OSError:
        return False


def probe():
    """Make every attempt. Only a write in the working folder must succeed."""
    settings = json.load(sys.stdin)
    broken = broken_walls(settings) if settings["isolates"] else []
    broken += [f"it may call {name}" for name, number in settings["calls"].items() if succeeds(call, number)]
    broken += [f"it opens sockets of family {number}" for number in (VSOCK, NETLINK) if succeeds(family, number)]
    if succeeds(read, f"/proc/{os.getppid()}/environ"):
        broken.append("it reads its supervisor")
    if not succeeds(write, os.getcwd()):
        broken.append("it cannot write in its working folder")
    if succeeds(processes, settings["processes"]):
        broken.append("it starts more processes than it may")
    os.write(int(os.environ["RESULT_FD"]), json.dumps(broken).encode())


def broken_walls(settings):
    """Return the attempts that succeed although the jail should prevent them."""
    broken = []
    if succeeds(network, settings["port"]):
        broken.append("it reaches the network")
    if succeeds(abstract, settings["abstract"]):
        broken.append("it reaches sockets of the host")
    broken += ["it reads " + path for path in settings["files"] if succeeds(read, path)]
    broken += ["it writes in " + folder for folder in settings["folders"] if succeeds(write, folder)]
    if len([name for name in os.listdir("/proc") if name.isdigit()]) > 8:
        broken.append("it sees the host's processes")
    if succeeds(nameless, settings["file_bytes"]):
        broken.append("it keeps more in files than it may")
    return broken


probe()
