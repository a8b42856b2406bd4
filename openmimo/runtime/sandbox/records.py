"""Limits and results of jailed programs, and the two errors of the jail itself."""

import math
from dataclasses import dataclass, fields

from openmimo.core.errors import ConfigError, UserError

MAX_FILES = 4096


class SandboxUnavailableError(UserError):
    """This machine cannot isolate programs, or the requested jail fails its self-test."""


class JailError(RuntimeError):
    """The jail failed before the program began. The program must be run again, not scored."""


@dataclass(frozen=True)
class SandboxLimits:
    """Resource limits of one run. The kernel refuses what exceeds them, or the run is killed.

    Attributes:
        cpu_seconds: CPU time of each process.
        wall_seconds: Wall time of the run.
        memory_bytes: Address space of each process, and memory of all processes together.
        processes: Simultaneous processes, including threads.
        file_bytes: Size of each file, of the working folder, of /tmp and of /dev/shm. Each of these folders holds at
            most MAX_FILES files and folders.
        output_bytes: Bytes kept of stdout and of stderr each. A run that writes sixteen times as much is killed.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    processes: int = 32
    file_bytes: int = 16 * 2**20
    output_bytes: int = 64 * 2**10

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ConfigError(f"SandboxLimits.{field.name} is {getattr(self, field.name)}; it must be above zero.")

    def resource_limits(self) -> dict[str, tuple[int, int]]:
        """Return soft and hard limits by their names in module `resource`. The hard CPU limit is one second later."""
        seconds = math.ceil(self.cpu_seconds)
        return {
            "RLIMIT_CPU": (seconds, seconds + 1),
            "RLIMIT_AS": (self.memory_bytes, self.memory_bytes),
            "RLIMIT_FSIZE": (self.file_bytes, self.file_bytes),
            "RLIMIT_NPROC": (self.processes, self.processes),
            "RLIMIT_NOFILE": (256, 256),
            "RLIMIT_CORE": (0, 0),
            "RLIMIT_MEMLOCK": (2**16, 2**16),
            "RLIMIT_MSGQUEUE": (0, 0),
            "RLIMIT_SIGPENDING": (256, 256),
            "RLIMIT_RTPRIO": (0, 0),
        }


@dataclass(frozen=True)
class SandboxResult:
    """The result of one run.

    Attributes:
        exit_code: Exit code of the program; 128 + n if signal n ended it.
        stdout: The first `output_bytes` bytes.
        stderr: The first `output_bytes` bytes.
        timed_out: Whether the wall limit ended the run.
        truncated: Whether stdout or stderr was longer.
        killed_by: None, the limit that ended the run ("wall", "cpu", "memory", "output", "disk"), or a signal's name.
        seconds: Wall time.
        result: What a Python program wrote to the file descriptor in the environment variable RESULT_FD.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    truncated: bool
    killed_by: str | None
    seconds: float
    result: bytes = b""

    @property
    def text(self) -> str:
        """stdout as text; bytes that are not UTF-8 become U+FFFD."""
        return self.stdout.decode(errors="replace")

    @property
    def error_text(self) -> str:
        """stderr as text; bytes that are not UTF-8 become U+FFFD."""
        return self.stderr.decode(errors="replace")
