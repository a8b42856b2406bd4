"""One jailed process: it starts, waits for one job, is watched while it runs, and is killed with its descendants."""

import contextlib
import functools
import json
import os
import select
import selectors
import signal
import subprocess
import time
from pathlib import Path

from openmimo.runtime.sandbox import cgroup, seccomp, watch
from openmimo.runtime.sandbox.records import JailError, SandboxLimits, SandboxResult
from openmimo.runtime.sandbox.tiers import STORES, WORKSPACE, JailPaths, Tier

START = Path(__file__).with_name("jailed_start.py")
START_SECONDS = 20.0
WATCH_SECONDS = 0.1
DRAIN_SECONDS = 0.5  # for output that is still in the pipes when the program exits
MAX_TIMES_OUTPUT = 16
FILTER = functools.cache(seccomp.program)


class _Inlet:
    """Bytes to be written into a pipe."""

    def __init__(self, descriptor: int, data: bytes):
        self.descriptor, self.data = descriptor, memoryview(data)

    def move(self) -> bool:
        """Write what fits. Returns False when everything is written or the reader has closed the pipe."""
        try:
            self.data = self.data[os.write(self.descriptor, self.data[: 2**16]) :]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return len(self.data) > 0


class _Outlet:
    """Bytes read from a pipe. The first `limit` bytes are kept, and the others are counted."""

    def __init__(self, descriptor: int, limit: int):
        self.descriptor, self.limit = descriptor, limit
        self.kept, self.total = bytearray(), 0

    def move(self) -> bool:
        """Read what is available. Returns False when every writer has closed the pipe."""
        try:
            chunk = os.read(self.descriptor, 2**16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.total += len(chunk)
        self.kept += chunk[: self.limit - len(self.kept)]
        return len(chunk) > 0


class Jail:
    """A Python process that waits in a jail for one job. Until then the host may fill its working folder.

    The kernel kills the process when the thread that created this object ends, so no jail outlives a trainer.
    """

    def __init__(self, tier: Tier, paths: JailPaths, limits: SandboxLimits):
        self.tier, self.paths, self.limits = tier, paths, limits
        self.marker = f"JAIL={paths.work.parent.name}"
        self.stores: dict[str, int] = {}  # descriptors of the writable folders, if they are private to the jail
        self._group: cgroup.Group | None = None
        inputs, outputs = [os.pipe() for _ in range(2)], [os.pipe() for _ in range(3)]
        (stdin, self._stdin), (control, self._control) = inputs
        (self._stdout, stdout), (self._stderr, stderr), (self._result, result) = outputs
        self._open = {self._stdin, self._control, self._stdout, self._stderr, self._result}
        settings = {"limits": limits.resource_limits(), "control": control, "result": result, "filter": FILTER()}
        python = [paths.interpreter.executable, "-s", "-S", "-B", "-c", START.read_text(), json.dumps(settings)]
        isolates = tier.isolates
        try:
            self.process = subprocess.Popen(
                tier.command(python, paths, limits),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(control, result),
                env=self._environment("/workspace" if isolates else str(paths.work)),
                cwd="/" if isolates else paths.work,
                start_new_session=True,
            )
        except OSError as error:
            self._close(*self._open)
            raise JailError(f"the jail {tier.name!r} cannot be started: {error}") from error
        finally:
            for descriptor in (stdin, control, stdout, stderr, result):
                os.close(descriptor)
        for descriptor in self._open:
            os.set_blocking(descriptor, False)

    def _environment(self, home: str) -> dict[str, str]:
        """Return the environment variables of the program. PATH is also used to build the jail."""
        folders = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        interpreter_folder = str(Path(self.paths.interpreter.executable).parent)
        name, _, value = self.marker.partition("=")
        return {
            "PATH": ":".join(folders if interpreter_folder in folders else [interpreter_folder, *folders]),
            "HOME": home,
            "TMPDIR": "/tmp" if self.tier.isolates else home,
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            name: value,
        }

    def wait_until_ready(self) -> None:
        """Wait until the jail is built and its Python waits for a job.

        Raises:
            JailError: The jail did not start.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._result, selectors.EVENT_READ)
            ready = bool(selector.select(START_SECONDS)) and os.read(self._result, 1) == b"R"
        if not ready:
            stderr_text = ""
            with contextlib.suppress(BlockingIOError):
                stderr_text = os.read(self._stderr, 2000).decode(errors="replace").strip()
            self.kill()
            raise JailError(f"the jail {self.tier.name!r} did not start: {stderr_text or 'it wrote no message'}")
        try:
            self._attach(list(watch.process_tree(self.process.pid)))
        except OSError as error:
            self.kill()
            raise JailError(f"the jail {self.tier.name!r} started, but cannot be controlled: {error}") from error

    def _attach(self, pids: list[int]) -> None:
        """Move the waiting processes into a control group, and open the private folders of the jail."""
        if cgroup.parents():
            room = len(STORES) * self.limits.file_bytes  # the group also counts files in memory
            memory, processes = self.limits.memory_bytes + room, self.limits.processes + len(pids)
            self._group = cgroup.Group(self.paths.root.parent.name, memory, processes)
            self._group.add(pids)
        if self.tier.isolates:
            for path in STORES:
                self.stores[path] = os.open(f"/proc/{pids[-1]}/root{path}", os.O_RDONLY | os.O_DIRECTORY)

    @property
    def work(self) -> int | None:
        """The descriptor of the working folder, if it is private to the jail."""
        return self.stores.get(WORKSPACE)

    def alive(self) -> bool:
        """Return whether the jail can still run a job."""
        return bool(self._open) and self.process.poll() is None

    def begin(self, job: dict) -> None:
        """Start a job for `converse`."""
        inlet = _Inlet(self._control, json.dumps(job).encode())
        while inlet.move():
            select.select([], [self._control], [], WATCH_SECONDS)
        self._close(self._control)

    def converse(self, request: bytes, deadline: float) -> bytes | None:
        """Write to the job's stdin. Returns the next line of its result, without the line break.

        Returns None if `deadline` (of `time.monotonic`) passes, the job exits, or it exceeds a limit.
        """
        inlet = _Inlet(self._stdin, request)
        reply = _Outlet(self._result, self.limits.output_bytes)
        next_watch = 0.0
        is_writing = True
        while not reply.kept.endswith(b"\n"):
            now = time.monotonic()
            if now >= deadline or reply.total > reply.limit:
                return None
            if now >= next_watch:
                if self._overuse():
                    return None
                next_watch = time.monotonic() + WATCH_SECONDS
            readable, writable, _ = select.select(
                [self._result], [self._stdin] if is_writing else [], [], WATCH_SECONDS
            )
            is_writing = inlet.move() if writable else is_writing
            if readable and not reply.move():
                return None
        return bytes(reply.kept[:-1])

    def run(self, job: dict, stdin: bytes) -> SandboxResult:
        """Run {"argv": [...]} or {"source": "..."} until it exits or exceeds a limit, and end the jail."""
        started = time.monotonic()
        most = self.limits.output_bytes
        inlets = [_Inlet(self._control, json.dumps(job).encode()), _Inlet(self._stdin, stdin)]
        outputs = [_Outlet(self._stdout, most), _Outlet(self._stderr, most)]
        result = _Outlet(self._result, most * MAX_TIMES_OUTPUT)
        try:
            killed_by = self._exchange(inlets, [*outputs, result], started + self.limits.wall_seconds)
            if killed_by is None and self._group and self._group.ran_out_of_memory():
                killed_by = "memory"
        finally:
            self.kill()
        code = self.process.returncode
        code = 128 - code if code < 0 else code
        return SandboxResult(
            exit_code=code,
            stdout=bytes(outputs[0].kept),
            stderr=bytes(outputs[1].kept),
            timed_out=killed_by == "wall",
            truncated=any(output.total > output.limit for output in outputs),
            killed_by=killed_by or _signal_name(code),
            seconds=time.monotonic() - started,
            result=bytes(result.kept),
        )

    def _exchange(self, inlets: list[_Inlet], outlets: list[_Outlet], deadline: float) -> str | None:
        """Move bytes in and out until the program exits or exceeds a limit. Returns that limit, if any."""
        with selectors.DefaultSelector() as selector:
            for inlet in inlets:
                if inlet.data:
                    selector.register(inlet.descriptor, selectors.EVENT_WRITE, inlet)
                else:
                    self._close(inlet.descriptor)
            for outlet in outlets:
                selector.register(outlet.descriptor, selectors.EVENT_READ, outlet)
            killed_by, next_watch = None, 0.0
            while killed_by is None and self.process.poll() is None:
                now = time.monotonic()
                if now >= deadline:
                    killed_by = "wall"
                elif any(outlet.total > self.limits.output_bytes * MAX_TIMES_OUTPUT for outlet in outlets):
                    killed_by = "output"
                elif now >= next_watch:
                    killed_by, next_watch = self._overuse(), time.monotonic() + WATCH_SECONDS
                self._move(selector, min(WATCH_SECONDS, max(0.0, deadline - now)))
            self._signal_all()
            drained = time.monotonic() + DRAIN_SECONDS
            while any(key.events & selectors.EVENT_READ for key in selector.get_map().values()):
                if time.monotonic() > drained:
                    break
                self._move(selector, WATCH_SECONDS)
            return killed_by

    def _move(self, selector: selectors.BaseSelector, seconds: float) -> None:
        """Wait up to `seconds` for a pipe that is ready, or for the process to exit; then move bytes."""
        if not selector.get_map():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            return
        for key, _ in selector.select(seconds):
            if not key.data.move():
                selector.unregister(key.fd)
                self._close(key.fd)

    def _overuse(self) -> str | None:
        """Return the exceeded limit, of those that the kernel does not enforce immediately."""
        pid, limits = self.process.pid, self.limits
        if self._group and self._group.memory:
            if self._group.ran_out_of_memory():
                return "memory"
        elif watch.exceeds_memory(pid, limits.memory_bytes):
            return "memory"
        if self.tier.isolates:
            return "disk" if watch.exceeds_files(self.stores.values()) else None
        return "disk" if watch.exceeds_disk(self.paths.work, limits.file_bytes, pid) else None

    def _signal_all(self) -> None:
        """Kill every process of the jail. In a process namespace the others die with the first process."""
        if self.process.returncode is not None:
            return
        if not self.tier.isolates:
            watch.end_tree(self.process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the jail. May be called repeatedly."""
        self._signal_all()
        self.process.wait()
        self._close(*self._open)
        while self.stores:
            os.close(self.stores.popitem()[1])
        if self._group:
            self._group.close()
            self._group = None

    def _close(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            if descriptor in self._open:
                self._open.discard(descriptor)
                os.close(descriptor)


def _signal_name(exit_code: int) -> str | None:
    """Return the signal of an exit code above 128. A program can also exit with such a code on its own."""
    with contextlib.suppress(ValueError):
        name = signal.Signals(exit_code - 128).name
        return "cpu" if name == "SIGXCPU" else name
    return None
