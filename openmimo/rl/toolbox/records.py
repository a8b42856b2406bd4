"""Limits, results, counters and errors of tool calls."""

from dataclasses import dataclass
from typing import Any, Literal

from openmimo.core.errors import ConfigError


class ToolMistakeError(Exception):
    """A mistake of the model, such as an unknown page. The message is returned to the model."""


class ToolFailureError(RuntimeError):
    """The infrastructure failed. The sample is rolled out again and not scored."""


class WorkerTimeoutError(Exception):
    """A call exceeded its deadline, and its worker was replaced."""


@dataclass(frozen=True)
class ToolLimits:
    """The limits of one tool over all episodes (paper section 4.6.3: quota and queries per second).

    Attributes:
        quota: Simultaneous calls, and the number of warm workers.
        calls_per_second: Average rate of calls (0: no limit).
        burst: Calls that may begin together after a pause.
        timeout_seconds: Deadline of a call after its begin.
        wait_seconds: Maximum wait for quota and rate. A longer wait raises ToolFailureError.
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
    """The result of a call.

    Attributes:
        value: The value of the tool, or the text of the error.
        error: The kind of error; "" for none.
    """

    value: Any
    error: Literal["", "mistake", "timeout"] = ""

    @property
    def text(self) -> str:
        """The text for the model."""
        return f"error: {self.value}" if self.error else str(self.value)


@dataclass
class ToolCounts:
    """Live counters of one tool.

    Attributes:
        calls: Calls that have begun or failed to begin.
        mistakes: Calls that raised ToolMistakeError.
        timeouts: Calls that exceeded their deadline.
        failures: Calls that raised ToolFailureError.
        cancelled: Calls that were cancelled while waiting, because their session was closed.
        waiting: Calls that currently wait for a worker or the rate.
        running: Calls that currently run.
        wait_seconds: Total waiting time.
        run_seconds: Total running time.
        longest_seconds: Longest running time of a call.
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
