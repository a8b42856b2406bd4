"""What goes into a jail and what comes out: limits, results, and the two ways in which the jail itself can fail."""

import math
from dataclasses import dataclass, fields

from openmimo.core.errors import ConfigError, UserError

MAX_FILES = 4096


class SandboxUnavailableError(UserError):
    """This machine cannot jail a program well enough, or the jail that was asked for does not hold here."""


class JailError(RuntimeError):
    """The jail broke down before the program began. Says nothing about the program: try again, do not score it."""


@dataclass(frozen=True)
class SandboxLimits:
    """What one run may use. Whatever goes over is refused by the kernel, or the run is killed.

    cpu_seconds: of each process. wall_seconds: of the run, however it waits. memory_bytes: address space of each
    process, and memory of all together. processes: at one time, threads counted. file_bytes: any one file, the
    working folder as a whole, and each of /tmp and /dev/shm; each of these holds at most MAX_FILES files and folders.
    output_bytes: kept of stdout and of stderr, each; a run that writes sixteen times as much is killed.
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
        """Soft and hard values by the names of the `resource` module; a second lies between being told and killed."""
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
    """How a run ended.

    exit_code: the program's, 128 + n where signal n ended it. stdout, stderr: the first `output_bytes` of each.
    truncated: whether either was longer. killed_by: None, or the limit that ended the run ("wall", "cpu", "memory",
    "output", "disk"), or the name of a signal. result: what a Python program wrote to the file descriptor named by the
    environment variable RESULT_FD, apart from its output.
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
