"""Runs inside a jail and tries to get out, as far as that can be tried in a moment. Reports what it could do.

Settings come as JSON on stdin: `port` of a listener on the host, `files` to read, `folders` to write in, `processes`.
"""

import json
import os
import signal
import socket
import sys
import time


def network(port):
    """Connects to the host that started the jail."""
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


def read(path):
    """Reads a file of the host."""
    with open(path, "rb") as file:
        return bool(file.read(1))


def write(folder):
    """Makes a file outside the working folder."""
    path = os.path.join(folder, f"openmimo-probe-{os.getpid()}")
    with open(path, "wb"):
        os.unlink(path)
        return True


def processes(limit):
    """Starts processes until it is refused, or has more than `limit`."""
    children = []
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
    """Whether an attempt worked."""
    try:
        return attempt(target)
    except OSError:
        return False


def probe():
    """Makes every attempt, and one of what must work: a file in the working folder."""
    settings = json.load(sys.stdin)
    broken = []
    if succeeds(network, settings["port"]):
        broken.append("it reaches the network")
    broken += ["it reads " + path for path in settings["files"] if succeeds(read, path)]
    broken += ["it writes in " + folder for folder in settings["folders"] if succeeds(write, folder)]
    if len([name for name in os.listdir("/proc") if name.isdigit()]) > 8:
        broken.append("it sees the host's processes")
    if not succeeds(write, os.getcwd()):
        broken.append("it cannot write in its working folder")
    if succeeds(processes, settings["processes"]):
        broken.append("it starts more processes than it may")
    os.write(int(os.environ["RESULT_FD"]), json.dumps(broken).encode())


probe()
