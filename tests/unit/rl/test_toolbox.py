"""Quota, rate, deadlines, broken and hanging workers, and counters, as the caller sees them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from openmimo.core.errors import ConfigError
from openmimo.rl.toolbox import Tool, Toolbox, ToolFailureError, ToolLimits, ToolMistakeError
from openmimo.rl.toolbox.rate import TokenBucket

PATIENCE_SECONDS = 20.0  # an upper bound for events that happen at once unless the code hangs


class Scripted:
    """A worker that runs the function in the call, and records its creation and its end."""

    def __init__(self, record):
        self.record = record
        record.append("made")

    def call(self, arguments):
        return arguments["do"]()

    def close(self):
        self.record.append("closed")


def make_box(record=None, **limits):
    record = [] if record is None else record
    return Toolbox({"tool": Tool(lambda: Scripted(record), ToolLimits(**limits))})


def raise_(error):
    raise error


def test_results_mistakes_and_counters():
    with make_box(quota=2) as box:
        assert box.call("tool", {"do": lambda: 42}).value == 42
        result = box.call("tool", {"do": lambda: raise_(ToolMistakeError("no such page"))})
        assert (result.error, result.text) == ("mistake", "error: no such page")
        counts = box.counts("tool")
        assert (counts.calls, counts.mistakes, counts.failures, counts.waiting, counts.running) == (2, 1, 0, 0, 0)
        metrics = box.metrics()
        assert metrics["tool/calls"] == 2.0
        assert metrics["tool/restarts"] == 0.0
        assert metrics["tool/mean_run_seconds"] <= metrics["tool/longest_seconds"]
        with pytest.raises(ConfigError, match="no tool 'other'"):
            box.call("other", {})


def test_workers_are_made_before_the_first_call_and_closed_in_the_end():
    record = []
    box = make_box(record, quota=3)
    box.call("tool", {"do": lambda: None})
    box.close()
    assert record.count("made") == record.count("closed") == 3
    with pytest.raises(ToolFailureError, match="closed"):
        box.call("tool", {"do": lambda: None})


def test_quota_holds_whoever_calls():
    running, most, lock = [], [], threading.Lock()
    both = threading.Barrier(2)

    def work():
        with lock:
            running.append(1)
            most.append(len(running))
        both.wait(PATIENCE_SECONDS)  # passes only if two calls run at the same time
        with lock:
            running.pop()

    with make_box(quota=2) as box, ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: box.call("tool", {"do": work}), range(8)))
        assert not any(result.error for result in results)
        assert max(most) == 2


@pytest.mark.parametrize("error", [ValueError("broke"), SystemExit(3), MemoryError()])
def test_a_broken_worker_is_replaced(error):
    record = []
    with make_box(record, quota=1) as box:
        with pytest.raises(ToolFailureError, match="failed") as raised:
            box.call("tool", {"do": lambda: raise_(error)})
        assert raised.value.__cause__ is error
        assert box.call("tool", {"do": lambda: 1}).value == 1
        assert record == ["made", "closed", "made"]
        assert box.metrics()["tool/restarts"] == 1.0
        assert box.counts("tool").failures == 1


def test_a_worker_that_cannot_be_made_fails_calls_until_it_can():
    attempts = []

    def make():
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("no room")
        return Scripted([])

    with Toolbox({"tool": Tool(make, ToolLimits(quota=1))}) as box:
        failures = 0
        for _ in range(3):
            try:
                value = box.call("tool", {"do": lambda: "at last"}).value
                break
            except ToolFailureError:
                failures += 1
        assert value == "at last"
        assert failures <= 2


def test_a_hanging_call_times_out_and_its_worker_is_replaced():
    record, release, ended = [], threading.Event(), threading.Event()
    with make_box(record, quota=1, timeout_seconds=0.05) as box:
        late = box.call("tool", {"do": lambda: release.wait(PATIENCE_SECONDS)}, on_end=ended.set)
        assert late.error == "timeout"
        assert "0.05 seconds" in late.text
        assert not ended.is_set()  # the call still runs after its caller has given up
        assert box.call("tool", {"do": lambda: 1}).value == 1
        release.set()
        assert ended.wait(PATIENCE_SECONDS)
        assert box.counts("tool").timeouts == 1
        assert box.metrics()["tool/restarts"] == 1.0


def test_a_time_out_of_the_tools_own_is_its_failure():
    with make_box(quota=1) as box, pytest.raises(ToolFailureError, match="TimeoutError"):
        box.call("tool", {"do": lambda: raise_(TimeoutError("upstream"))})


def test_who_waits_too_long_meets_a_failure():
    release, begun = threading.Event(), threading.Event()

    def hold():
        begun.set()
        release.wait(PATIENCE_SECONDS)

    with make_box(quota=1, wait_seconds=0.05) as box, ThreadPoolExecutor(1) as thread:
        first = thread.submit(box.call, "tool", {"do": hold})
        assert begun.wait(PATIENCE_SECONDS)
        ends = []
        with pytest.raises(ToolFailureError, match="no worker"):
            box.call("tool", {"do": lambda: None}, on_end=lambda: ends.append(1))
        assert ends == [1]
        release.set()
        assert not first.result(PATIENCE_SECONDS).error
        counts = box.counts("tool")
        assert (counts.calls, counts.failures, counts.waiting) == (2, 1, 0)


def test_a_waiting_call_can_be_given_up():
    release, begun, cancelled = threading.Event(), threading.Event(), threading.Event()

    def hold():
        begun.set()
        release.wait(PATIENCE_SECONDS)

    with make_box(quota=1) as box, ThreadPoolExecutor(2) as threads:
        first = threads.submit(box.call, "tool", {"do": hold})
        assert begun.wait(PATIENCE_SECONDS)
        second = threads.submit(box.call, "tool", {"do": lambda: None}, cancelled=cancelled)
        cancelled.set()
        assert "cancelled" in str(second.exception(PATIENCE_SECONDS))
        release.set()
        first.result(PATIENCE_SECONDS)
        assert box.counts("tool").cancelled == 1
        assert box.call("tool", {"do": lambda: 1}).value == 1


def test_token_bucket():
    now = [0.0]
    bucket = TokenBucket(2.0, burst=3, clock=lambda: now[0])
    assert [bucket.reserve(10.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    assert bucket.reserve(1.0) is None  # the delay would be 1.5; a refusal takes no token
    assert bucket.reserve(2.0) == 1.5
    now[0] = 100.0
    assert [bucket.reserve(10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_the_rate_limits_calls():
    with make_box(quota=4, calls_per_second=0.001, wait_seconds=0.5) as box:
        assert box.call("tool", {"do": lambda: 1}).value == 1
        with pytest.raises(ToolFailureError, match="rate"):
            box.call("tool", {"do": lambda: 1})
        assert box.counts("tool").failures == 1


@pytest.mark.parametrize("wrong", [{"quota": 0}, {"calls_per_second": -1.0}, {"burst": 0}, {"timeout_seconds": 0.0}])
def test_limits_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ToolLimits(**wrong)
