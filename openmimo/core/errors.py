"""Errors that a user can fix, and interruption by SIGINT or SIGTERM, after which a command saves its state.

The command line prints a UserError as one paragraph without a traceback, and exits with 1.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


class UserError(Exception):
    """Invalid user input. The message says what is wrong, where (file, key, line), and how to fix it."""


class ConfigError(UserError):
    """A configuration is unknown, contradictory or impossible."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the model."""


class DataError(UserError):
    """A data source cannot be read, or contains unusable data."""


class DivergedError(UserError):
    """A run cannot continue: its loss, gradients or weights are not finite."""


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the command.

    Attributes:
        signal: The signal number. The exit code is 128 + signal.
        kept: A sentence that says what was saved (empty: unknown).
    """

    def __init__(self, number: int, kept: str = ""):
        super().__init__(kept)
        self.signal = number
        self.kept = kept


@dataclass
class StopRequest:
    """The first signal received, if any."""

    signal: int | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Yield a record of the first SIGINT or SIGTERM in the block. A second signal ends the process immediately.

    Only the main thread receives signals; in other threads the block has no effect.
    """
    request = StopRequest()

    def record(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if request.signal is not None:
            os.write(2, f"\n{name} again: exiting now; earlier checkpoints are kept.\n".encode())
            os._exit(128 + number)
        request.signal = number
        os.write(2, f"\n{name}: finishing this step and saving a checkpoint (repeat to exit now)\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise Interrupted in the main thread during the block, as SIGINT raises KeyboardInterrupt."""

    def end(number: int, frame: object) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
