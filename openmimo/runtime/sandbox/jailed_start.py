"""The first program inside every jail: takes its limits, says that it is ready, waits for one job and becomes it.

Runs from its source text under a Python that need not know this package, so it imports the standard library only.
"""

import sys

sys.path[:] = [folder for folder in sys.path if folder]  # the working folder may hold a json.py of the program's own

import _sitebuiltins  # noqa: E402
import builtins  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import types  # noqa: E402


def limit(limits):
    """Lowers this process's limits; those of its children can then never be higher."""
    for name, (soft, hard) in limits.items():
        highest = resource.getrlimit(getattr(resource, name))[1]
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        resource.setrlimit(getattr(resource, name), (soft, hard))


def receive(descriptor):
    """All that comes over a pipe until its other end is closed."""
    with open(descriptor, "rb") as pipe:
        return pipe.read()


def become_command(argv):
    """Replaces this process by a command."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


def become_source(source):
    """Runs Python source as the main module of this process."""
    builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D (end of file)")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = builtins
    sys.argv = ["main.py"]
    sys.path.insert(0, os.getcwd())
    exec(compile(source, "main.py", "exec", dont_inherit=True), main.__dict__)


def start():
    """Waits for a job on the control pipe: {"argv": [...]} or {"source": "..."}; nothing at all means: end."""
    settings = json.loads(sys.argv[1])
    limit(settings["limits"])
    os.write(settings["result"], b"R")
    text = receive(settings["control"])
    if not text:
        return
    job = json.loads(text)
    if "argv" in job:
        os.close(settings["result"])
        become_command(job["argv"])
    else:
        os.environ["RESULT_FD"] = str(settings["result"])
        become_source(job["source"])


start()
