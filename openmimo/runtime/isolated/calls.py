"""Calls of named functions on untrusted text, in child processes that are killed at a deadline."""

import atexit
import dataclasses
import functools
import json
import os
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import openmimo
from openmimo.core.services import Service, register_service
from openmimo.runtime.sandbox.interpreter import Interpreter, find_interpreter
from openmimo.runtime.sandbox.jail import Jail
from openmimo.runtime.sandbox.records import JailError, SandboxLimits, SandboxUnavailableError
from openmimo.runtime.sandbox.sandbox import choose_tier
from openmimo.runtime.sandbox.tiers import OWN_USER, Tier
from openmimo.runtime.sandbox.workspace import Workspace

PREPARE_SECONDS = 60.0
GRACE_SECONDS = 5.0
LIMITS = SandboxLimits(cpu_seconds=10**6, wall_seconds=10**6, memory_bytes=2 * 2**30, processes=64)

Ended = Literal["returned", "raised", "timed out", "died"]


@dataclass(frozen=True)
class Call:
    """A call of a function that returns a float.

    Attributes:
        function: The function, as "module:name" of this package.
        arguments: Its arguments, which are JSON values.
    """

    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call.

    Attributes:
        ended: "returned", "raised", "timed out", or "died" (the process exited by itself).
        value: The return value, if any.
        error: The exception, if any.
    """

    ended: Ended
    value: float | None = None
    error: str = ""


class IsolatedCalls:
    """Child processes that call named functions. Thread-safe.

    Each process runs in the best jail of this machine. If no jail works, or the user of the jail cannot read the
    packages of this Python, the process is a plain child process of this user, and a warning says so. In both cases,
    text passed to `eval` must be an expression (`expressions.py`), and a call that exceeds its deadline is killed.

    Args:
        processes: Number of simultaneous calls.
    """

    def __init__(self, processes: int = 2):
        self.counts: Counter[str] = Counter()
        self._own = threading.local()
        self._children: list[_Child] = []
        # The kernel kills a jail when the thread that started it ends, so the threads live as long as this object.
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="isolated-call")

    def run(self, call: Call, *, seconds: float, prepare: Call | None = None) -> Outcome:
        """Make a call and wait for it.

        Args:
            call: The function that reads untrusted text.
            seconds: The deadline of the call.
            prepare: A trusted call that runs first, in the process from which all calls are forked, so that its
                imports and caches persist. Its deadline is 60 seconds.

        Raises:
            JailError: The child process cannot be started, or the preparation fails.
        """
        outcome = self._threads.submit(self._run, call, seconds, prepare).result()
        self.counts[outcome.ended] += 1
        return outcome

    def metrics(self) -> dict[str, float]:
        """Return counts of outcomes as `scoring/<outcome>`; empty before the first call."""
        counts = self.counts
        return {f"scoring/{ended.replace(' ', '_')}": counts[ended] for ended in get_args(Ended)} if counts else {}

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()

    def _run(self, call: Call, seconds: float, prepare: Call | None) -> Outcome:
        child = getattr(self._own, "child", None)
        if child is None or not child.alive():
            child = self._own.child = _start(call.function)
            self._children.append(child)
        request = {"call": dataclasses.astuple(call), "seconds": seconds}
        request["prepare"] = prepare and dataclasses.astuple(prepare)
        reply = child.ask(request, seconds + PREPARE_SECONDS + GRACE_SECONDS)
        if reply is None:
            self._children.remove(child)
            child.close()
            return Outcome("died")
        if reply["ended"] == "unprepared":
            raise JailError(f"{call.function} cannot be called: {reply.get('error')}")
        return Outcome(reply["ended"], reply.get("value"), reply.get("error", ""))


class _Child:
    """A process that serves calls, with its jail and working folder."""

    def __init__(self, tier: Tier, interpreter: Interpreter):
        self._workspace = Workspace(lambda paths: Jail(tier, paths, LIMITS), interpreter, shown=_shown_folders())
        self._jail = Jail(tier, self._workspace.paths, LIMITS)
        self._unread = b""
        try:
            self._jail.wait_until_ready()
            self._jail.begin({"source": _program()})
        except BaseException:
            self.close()
            raise

    def alive(self) -> bool:
        return self._jail.alive()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the reply to one request; None if the process exits or the time runs out."""
        line = self._jail.converse(json.dumps(request).encode() + b"\n", time.monotonic() + seconds)
        try:
            reply = json.loads(line or b"")
        except ValueError:
            return None
        return reply if isinstance(reply, dict) and reply.get("ended") else None

    def close(self) -> None:
        self._jail.kill()
        self._workspace.close()


@functools.cache
def isolated_calls() -> IsolatedCalls:
    """Return the child processes that all scorers of this process share. They end with this process."""
    calls = IsolatedCalls()
    atexit.register(calls.close)
    register_service("scoring", Service(calls.metrics))
    return calls


def _start(function: str) -> _Child:
    """Start a child process that can call `function`, jailed if possible."""
    try:
        interpreter = find_interpreter()
        child = _Child(choose_tier(None, allow_unsafe=True), interpreter)
    except (SandboxUnavailableError, JailError) as error:
        return _start_plain(str(error))
    load = ("openmimo.runtime.isolated.served:load", (function,))
    ready = child.ask({"call": None, "seconds": 0, "prepare": load}, PREPARE_SECONDS)
    if ready is not None and ready["ended"] == "prepared":
        return child
    child.close()
    reason = ready.get("error") if ready else "the process ended"
    return _start_plain(f"{function} cannot be loaded in the jail with {interpreter.executable}: {reason}")


def _start_plain(reason: str) -> _Child:
    warnings.warn(
        f"Answers are scored in a child process without a jail: {reason}. The text still cannot run as code, and its "
        "time and memory are limited.",
        stacklevel=2,
    )
    return _Child(OWN_USER, Interpreter(sys.executable, sys.prefix))


def _shown_folders() -> tuple[Path, ...]:
    """Return the folders that a child must read: this package, and those of installed packages."""
    package = Path(openmimo.__file__).parent
    installed = [Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    return (package, *(folder for folder in installed if folder.is_dir()))


def _program() -> str:
    """Return the source that a jailed Python runs. It sets the import path and serves calls."""
    package, *installed = map(str, _shown_folders())
    paths = [os.path.dirname(package), *installed]
    return (
        f"import os, sys\nsys.path.extend({paths!r})\n"
        "from openmimo.runtime.isolated.served import serve\nserve(int(os.environ['RESULT_FD']))\n"
    )
