"""The first program inside every jail: it sets limits, starts the process that waits for one job, and supervises it.

Job processes cannot signal the supervisor, trace it or open its files. The supervisor adopts their orphans and kills
them when the job exits. It runs from its source text under a Python that may lack this package, so it imports the
standard library only.
"""

import sys

sys.path[:] = [folder for folder in sys.path if folder]  # the working folder may contain a json.py

import _sitebuiltins  # noqa: E402
import builtins  # noqa: E402
import ctypes  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import struct  # noqa: E402
import types  # noqa: E402

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
libc = ctypes.CDLL(None, use_errno=True)


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def prctl(option, argument, pointer=0):
    """Call prctl(2). Raises OSError if it fails."""
    if libc.prctl(option, ctypes.c_ulong(argument), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def limit(limits):
    """Lower the limits of this process, which its children inherit and cannot raise."""
    for name, (soft, hard) in limits.items():
        highest = resource.getrlimit(getattr(resource, name))[1]
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        resource.setrlimit(getattr(resource, name), (soft, hard))


def install(code):
    """Install a seccomp filter for this process and its descendants. Constants may be names of processes."""
    pid = os.getpid()
    host = os.getppid() or pid  # zero across a process namespace
    names = {"supervisor": pid, "supervisor's group": -pid, "host": host, "host's group": -host}
    words = [(code, yes, no, names.get(value, value) & 0xFFFFFFFF) for code, yes, no, value in code]
    program = FilterProgram(len(words), b"".join(struct.pack("=HBBI", *word) for word in words))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))


def receive(descriptor):
    """Read a pipe until its other end is closed."""
    with open(descriptor, "rb") as pipe:
        return pipe.read()


def exec_command(argv):
    """Replace this process with a command."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


def exec_source(source):
    """Run Python source as the main module of this process."""
    builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D (end of file)")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.argv = ["main.py"]
    sys.path.insert(0, os.getcwd())
    exec(compile(source, "main.py", "exec", dont_inherit=True), main.__dict__)


def end_children():
    """Kill all children, and adopted grandchildren, until there are none."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            for pid in children.read().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def supervise(job):
    """Wait for the job, kill its leftover processes, and exit with its code (128 + n for signal n)."""
    ended = None
    while ended != job:
        ended, status = os.wait()
    end_children()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def stop(number, frame):
    """Handle the exit of the host process."""
    end_children()
    os._exit(128 + number)


def start():
    """Wait for a job on the control pipe: {"argv": [...]} or {"source": "..."}. An empty message ends the process."""
    settings = json.loads(sys.argv[1])
    limit(settings["limits"])
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_DUMPABLE, 0)
    signal.signal(signal.SIGTERM, stop)
    if os.getpid() != 1:  # process 1 of a namespace is killed with its parent, and takes all others with it
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    install(settings["filter"])
    job = os.fork()
    if job:
        os.close(settings["control"])
        os.close(settings["result"])
        supervise(job)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prctl(PR_SET_DUMPABLE, 1)
    os.setsid()
    os.write(settings["result"], b"R")
    text = receive(settings["control"])
    if not text:
        return
    job = json.loads(text)
    if "argv" in job:
        os.close(settings["result"])
        exec_command(job["argv"])
    else:
        os.environ["RESULT_FD"] = str(settings["result"])
        exec_source(job["source"])


start()
