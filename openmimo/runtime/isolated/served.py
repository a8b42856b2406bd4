"""The child process: it reads calls from stdin, makes each in a forked process, and writes the outcome.

A request is a JSON object on one line: `call` (["module:name", arguments], or null for none), `seconds`, and `prepare`
(a trusted call, or null). The latter runs in the process from which calls are forked, so imports and caches persist.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from openmimo.runtime.isolated.expressions import only_expressions

MAX_REPLY_BYTES = 4096


def serve(reply_descriptor: int) -> None:
    """Serve the requests on stdin until it is closed."""
    for line in sys.stdin.buffer:
        reply = json.dumps(_answer(json.loads(line)))
        os.write(reply_descriptor, reply.encode() + b"\n")


def load(name: str) -> Callable[..., Any]:
    """Return the function called "module:name". Raises ImportError or AttributeError."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        for name, arguments in [request["prepare"]] if request["prepare"] else []:
            load(name)(*arguments)
        if request["call"] is None:
            return {"ended": "prepared"}
        name, arguments = request["call"]
        call = functools.partial(load(name), *arguments)
    except Exception as error:  # a library may raise any exception; the host decides
        return {"ended": "unprepared", "error": f"{type(error).__name__}: {str(error)[:500]}"}
    return _call(call, request["seconds"])


def _call(function: Callable[[], float], seconds: float) -> dict[str, Any]:
    """Make one call in a forked process, and wait at most `seconds` for it."""
    outlet, inlet = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(outlet)
        _call_and_exit(function, inlet, seconds)
    os.close(inlet)
    try:
        written = _read(outlet, time.monotonic() + seconds)
    finally:
        os.close(outlet)
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if written is None:
        return {"ended": "timed out"}
    try:
        reply = json.loads(written)
    except ValueError:
        return {"ended": "died"}
    return reply if isinstance(reply, dict) else {"ended": "died"}


def _call_and_exit(function: Callable[[], float], inlet: int, seconds: float) -> None:
    """Make one call in this process. Never returns."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
    try:
        with only_expressions():
            reply: dict[str, Any] = {"ended": "returned", "value": float(function())}
    except BaseException as error:
        reply = {"ended": "raised", "error": f"{type(error).__name__}: {str(error)[:500]}"}
    os.write(inlet, json.dumps(reply).encode()[:MAX_REPLY_BYTES])
    os._exit(0)


def _read(outlet: int, deadline: float) -> bytes | None:
    """Return the bytes that the call wrote until it closed its pipe; None if `deadline` passes first."""
    written = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([outlet], [], [], left)[0]:
            return None
        chunk = os.read(outlet, MAX_REPLY_BYTES)
        written += chunk
        if not chunk or len(written) > MAX_REPLY_BYTES:
            return written
    return None
