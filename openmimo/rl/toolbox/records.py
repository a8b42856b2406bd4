"""What goes into a tool call and what comes out: limits, results, counters, and the two kinds of error."""

from dataclasses import dataclass
from typing import Any, Literal

from openmimo.core.errors import ConfigError


class ToolMistakeError(Exception):
    """The model's mistake, such as an unknown page. Its text goes back to the model, which may do better."""


class ToolFailureError(RuntimeError):
    """The infrastructure failed. It says nothing about the model: the sample is rolled out again, never scored."""


class WorkerTimeoutError(Exception):
    """A call went over its deadline; its worker has been replaced."""


@dataclass(frozen=True)
class ToolLimits:
    """What all episodes together may ask of one tool (paper section 4.6.3: quota and queries per second).

    Attributes:
        quota: Calls at one time, which is also the number of workers that are kept warm.
        calls_per_second: Calls that begin in a second, on average (0: no limit).
        burst: Calls that may begin at once after a pause.
        timeout_seconds: For one call, from its begin.
        wait_seconds: For quota and rate together; who waits longer meets a ToolFailureError.
    """

    quota: int = 4
    calls_per_second: float = 0.0
    burst: int = 1
    timeout_seconds: float = 30.0
    wait_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, least in {"quota": 1, "calls_per_second": 0.0, "burst": 1, "wait_seconds": 0.0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"ToolLimits.{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.timeout_seconds <= 0.0:
            raise ConfigError(f"ToolLimits.timeout_seconds is {self.timeout_seconds}; it must be above 0.")


@dataclass(frozen=True)
class ToolResult:
    """How a call ended. value: what the tool gave, or the text of the error. error: whose fault, "" for none."""

    value: Any
    error: Literal["", "mistake", "timeout"] = ""

    @property
    def text(self) -> str:
        """What the model is told."""
        return f"error: {self.value}" if self.error else str(self.value)


@dataclass
class ToolCounts:
    """Live counters of one tool.

    Attributes:
        calls: Calls that have begun or failed to begin.
        mistakes: Those that ended in a ToolMistakeError.
        timeouts: Those that went over their deadline.
        failures: Those that ended in a ToolFailureError.
        cancelled: Those given up while they waited, as their session was closed.
        waiting: Calls that wait for a worker or for the rate, now.
        running: Calls that a worker is at, now.
        wait_seconds: Time spent waiting, of all calls together.
        run_seconds: Time spent running.
        longest_seconds: The longest run.
    """

    calls: int = 0
    mistakes: int = 0
    timeouts: int = 0
    failures: int = 0
    cancelled: int = 0
    waiting: int = 0
    running: int = 0
    wait_seconds: float = 0.0
    run_seconds: float = 0.0
    longest_seconds: float = 0.0
