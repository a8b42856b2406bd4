"""Ending on SIGINT and SIGTERM: what can be saved is saved first."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ends the command.

    Attributes:
        signal: Its number; the exit code is 128 more.
        kept: A sentence that says what was saved (empty: unknown).
    """

    def __init__(self, number: int, kept: str = ""):
        super().__init__(kept)
        self.signal = number
        self.kept = kept


@dataclass
class StopRequest:
    """The first signal, if one has come."""

    signal: int | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside the block, the first SIGINT or SIGTERM is noted in what is yielded; a second one ends the process at once.

    Signals reach the main thread only; in other threads the block changes nothing.
    """
    request = StopRequest()

    def note(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if request.signal is not None:
            os.write(2, f"\n{name} again: ends at once; what was saved before stays.\n".encode())
            os._exit(128 + number)
        request.signal = number
        os.write(2, f"\n{name}: finishes this step and saves a checkpoint (again: ends at once)\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside the block, SIGTERM raises Interrupted in the main thread, as SIGINT raises KeyboardInterrupt."""

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
