"""Runs a solution on the inputs of its tests inside a jail, and reports the outputs without grading them.

It runs from its source text under a Python that may lack this package, so it imports the standard library only. The
host imports `encode` and `decode` from here. Expected values never enter the jail. Each test runs in its own process.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
import types

PR_SET_DUMPABLE = 4


def encode(value):
    """Encode a plain Python value as JSON, with the kind of container. Raises TypeError for any other value."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value) if abs(value) < 2**53 else {"int": hex(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, list) or type(value).__name__ in ("deque", "range", "dict_keys", "dict_values"):
        return [encode(item) for item in value]
    raise TypeError(f"{type(value).__name__} is not plain data")


def decode(coded):
    """Invert `encode`. Raises ValueError, TypeError or AttributeError for a malformed encoding."""
    if isinstance(coded, list):
        return [decode(item) for item in coded]
    if not isinstance(coded, dict):
        return coded
    ((kind, content),) = coded.items()
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind == "set":
        return {decode(item) for item in content}
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    raise ValueError(f"unknown kind {kind!r}")


def module(name):
    """Register an empty module under a name."""
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__["__builtins__"] = __builtins__
    return sys.modules[name]


def call(source, name, coded):
    """Return the value of one call. `name` is a function, or Class.method of a class without constructor arguments."""
    solution = module("solution")
    exec(compile(source, "solution.py", "exec", dont_inherit=True), solution.__dict__)
    owner, _, method = name.rpartition(".")
    function = getattr(getattr(solution, owner)() if owner else solution, method)
    return encode(function(*decode(coded["arguments"]), **decode(coded["keywords"])))


def run_call(job, test, out):
    """Run one CallTest in this process: writes its value or its exception into the pipe `out`."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    try:
        answer = {"value": call(job["source"], job["function"], test)}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    with open(out, "w") as pipe:
        json.dump(answer, pipe)


def run_program(job, test, out):
    """Run one StreamTest in this process, with its text as stdin and the pipe `out` as stdout."""
    with open("stdin", "wb+", buffering=0) as text:
        os.unlink("stdin")
        text.write(test["stdin"].encode())
        text.seek(0)
        os.dup2(text.fileno(), 0)
    os.dup2(out, 1)
    os.close(out)
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    try:
        exec(compile(job["source"], "main.py", "exec", dont_inherit=True), module("__main__").__dict__)
    finally:
        sys.stdout.flush()


def set_open(is_open):
    """Set whether processes of the same user may access the memory and descriptors of this process, e.g. by /proc."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, ctypes.c_ulong(is_open), 0, 0, 0)


def run_in_child(job, test, out, result):
    """Run one test in this child process. Never returns."""
    os.setsid()
    os.close(result)
    set_open(True)
    code = 1
    try:
        (run_call if job["function"] else run_program)(job, test, out)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        pass
    finally:
        os._exit(code & 255)


def run_test(job, test, result):
    """Run one test in a child process. Returns its output and its exit status (None if it was stopped)."""
    out, inward = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        run_in_child(job, test, inward, result)
    os.close(inward)
    os.set_blocking(out, False)
    deadline, written, status, is_open = time.monotonic() + job["seconds"], b"", None, True
    while status is None and time.monotonic() < deadline and len(written) <= job["most_bytes"]:
        # after the pipe is closed only the exit of the process remains to be awaited
        ready = select.select([out] if is_open else [], [], [], 0.05 if is_open else 0.002)[0]
        chunk = os.read(out, 65536) if ready else b""
        is_open = is_open and not (ready and not chunk)
        written += chunk
        ended, raw = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(raw) if ended else None
    while status is not None and is_open and len(written) <= job["most_bytes"] and select.select([out], [], [], 0)[0]:
        chunk = os.read(out, 65536)
        is_open, written = bool(chunk), written + chunk
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(out)
    return written, status


def main():
    """Read the job from stdin. Writes a line per test: its number, output and exit status."""
    set_open(False)
    job = json.load(sys.stdin)
    result = int(os.environ.pop("RESULT_FD"))
    with open(result, "w") as lines:
        for number, test in enumerate(job["tests"]):
            written, status = run_test(job, test, result)
            text = written[: job["most_bytes"]].decode(errors="replace")
            lines.write(json.dumps({"number": number, "written": text, "status": status}) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
