"""Sessions: one environment per episode, released when the episode ends; rewards in the background."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from openmimo.rl.toolbox import (
    Tool,
    Toolbox,
    ToolFailureError,
    ToolLimits,
    ToolMistakeError,
    ToolSessions,
    WarmEnvironments,
    close_shared,
    shared,
    shared_metrics,
)

PATIENCE_SECONDS = 20.0


class Doing:
    """A worker that runs the function in the call with the episode's environment."""

    def call(self, arguments):
        return arguments["do"](arguments.get("environment"))

    def close(self):
        pass


class Folders:
    """Environments that record which are open."""

    def __init__(self):
        self.num_made, self.open = 0, set()

    def make(self):
        self.num_made += 1
        self.open.add(self.num_made)
        return self.num_made

    def close(self, folder):
        self.open.remove(folder)


def make_sessions(folders=None, *, warm=0, most=0, patience_seconds=PATIENCE_SECONDS, **limits):
    toolbox = Toolbox({"tool": Tool(Doing, ToolLimits(**limits))})
    environments = folders and WarmEnvironments(folders.make, folders.close, warm=warm, most=most)
    return ToolSessions(toolbox, environments, patience_seconds)


def wait_until(condition):
    waiting = threading.Event()
    for _ in range(int(PATIENCE_SECONDS / 0.01)):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("did not happen")


def test_an_environment_is_taken_at_the_first_call_and_closed_with_the_session():
    folders, prepared = Folders(), []
    with make_sessions(folders) as sessions:
        session = sessions.open(prepared.append)
        assert folders.num_made == 0
        assert session.call("tool", {"do": lambda folder: folder}).value == 1
        assert session.call("tool", {"do": lambda folder: folder}).value == 1
        assert prepared == [1]
        assert sessions.metrics()["environments/in_use"] == 1.0
        session.close()
        session.close()
        assert not folders.open
        assert sessions.metrics()["sessions/open"] == 0.0
        with pytest.raises(ToolFailureError, match="closed"):
            session.call("tool", {"do": lambda folder: folder})
        assert sessions.open().call("tool", {"do": lambda folder: folder}).value == 2
    assert folders.num_made == 2


def test_close_during_a_call_gives_the_environment_back_when_the_call_ends():
    folders, begun, release = Folders(), threading.Event(), threading.Event()

    def work(folder):
        begun.set()
        release.wait(PATIENCE_SECONDS)
        assert folder in folders.open
        return "done"

    with make_sessions(folders) as sessions, ThreadPoolExecutor(1) as thread:
        session = sessions.open()
        running = thread.submit(session.call, "tool", {"do": work})
        assert begun.wait(PATIENCE_SECONDS)
        session.close()
        assert folders.open == {1}
        release.set()
        assert running.result(PATIENCE_SECONDS).value == "done"
        assert not folders.open


def test_close_while_a_call_waits_gives_the_call_up():
    folders, begun, release = Folders(), threading.Event(), threading.Event()

    def hold(folder):
        begun.set()
        release.wait(PATIENCE_SECONDS)

    with make_sessions(folders, quota=1) as sessions, ThreadPoolExecutor(2) as threads:
        first, second = sessions.open(), sessions.open()
        running = threads.submit(first.call, "tool", {"do": hold})
        assert begun.wait(PATIENCE_SECONDS)
        waiting = threads.submit(second.call, "tool", {"do": lambda folder: "never"})
        wait_until(lambda: len(folders.open) == 2)
        second.close()
        assert isinstance(waiting.exception(PATIENCE_SECONDS), ToolFailureError)
        assert len(folders.open) == 1
        release.set()
        running.result(PATIENCE_SECONDS)
        first.close()
        assert not folders.open


def test_a_time_out_gives_the_environment_up_but_not_before_the_call_has_ended():
    folders, release = Folders(), threading.Event()
    with make_sessions(folders, timeout_seconds=0.05) as sessions:
        session = sessions.open()
        with pytest.raises(ToolFailureError, match="discarded"):
            session.call("tool", {"do": lambda folder: release.wait(PATIENCE_SECONDS)})
        assert folders.open == {1}
        assert sessions.metrics()["sessions/lost_environments"] == 1.0
        release.set()
        wait_until(lambda: not folders.open)
        assert sessions.open().call("tool", {"do": lambda folder: folder}).value == 2


def test_a_time_out_without_an_environment_is_reported():
    release = threading.Event()
    with make_sessions(timeout_seconds=0.05) as sessions:
        result = sessions.open().call("tool", {"do": lambda _: release.wait(PATIENCE_SECONDS)})
        assert result.error == "timeout"
        release.set()


def test_what_cannot_be_prepared_is_given_back():
    folders = Folders()
    with make_sessions(folders) as sessions:

        def fail(folder):
            raise OSError("disk full")

        session = sessions.open(fail)
        with pytest.raises(OSError, match="disk full"):
            session.call("tool", {"do": lambda folder: folder})
        assert not folders.open
        assert sessions.metrics()["sessions/open"] == 0.0


def test_the_reward_runs_in_the_background():
    release = threading.Event()
    with make_sessions() as sessions:
        session = sessions.open()
        session.start_reward("tool", {"do": lambda _: release.wait(PATIENCE_SECONDS) and 0.5})
        release.set()
        assert session.reward() == 0.5
        with pytest.raises(ToolFailureError, match="not started"):
            sessions.open().reward()


def test_a_reward_that_fails_is_tried_once_more():
    attempts = []

    def score(_):
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("lost")
        return 1.0

    with make_sessions() as sessions:
        session = sessions.open()
        session.start_reward("tool", {"do": score})
        assert session.reward() == 1.0
        assert sessions.metrics()["sessions/reward_retries"] == 1.0


def test_a_reward_that_hangs_is_tried_once_more():
    attempts, release = [], threading.Event()

    def score(_):
        attempts.append(1)
        if len(attempts) == 1:
            release.wait(PATIENCE_SECONDS)
        return 1.0

    with make_sessions(timeout_seconds=0.2, quota=1) as sessions:
        session = sessions.open()
        session.start_reward("tool", {"do": score})
        assert session.reward() == 1.0
        release.set()


@pytest.mark.parametrize("error", [ToolMistakeError("odd"), OSError("lost")])
def test_a_reward_that_cannot_be_had_is_a_failure(error):
    def score(_):
        raise error

    with make_sessions() as sessions:
        session = sessions.open()
        session.start_reward("tool", {"do": score})
        with pytest.raises(ToolFailureError):
            session.reward()


def test_environments_are_made_in_advance():
    folders = Folders()
    with make_sessions(folders, warm=2) as sessions:
        wait_until(lambda: sessions.metrics()["environments/ready"] == 2.0)
        session = sessions.open()
        session.call("tool", {"do": lambda folder: None})
        assert sessions.metrics()["environments/warm_hits"] == 1.0
        wait_until(lambda: sessions.metrics()["environments/ready"] == 2.0)
        session.close()
    assert not folders.open


def test_environments_have_a_limit():
    folders = Folders()
    with make_sessions(folders, most=1, patience_seconds=0.05) as sessions:
        first, second = sessions.open(), sessions.open()
        first.call("tool", {"do": lambda folder: None})
        with pytest.raises(ToolFailureError, match="none free"):
            second.call("tool", {"do": lambda folder: None})
        first.close()
        assert sessions.open().call("tool", {"do": lambda folder: folder}).value == 2


def test_an_environment_that_cannot_be_made_leaves_no_trace():
    attempts = []

    def make():
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("no room")
        return "folder"

    environments = WarmEnvironments(make, lambda folder: None, most=1)
    with pytest.raises(OSError, match="no room"):
        environments.take(0.05)
    assert environments.take(0.05) == "folder"


def test_the_end_of_all_sessions_ends_each():
    folders = Folders()
    with make_sessions(folders) as sessions:
        session = sessions.open()
        session.call("tool", {"do": lambda folder: None})
    assert not folders.open
    with pytest.raises(ToolFailureError, match="closed"):
        session.call("tool", {"do": lambda folder: None})


def test_sessions_are_shared_by_name_and_key():
    close_shared()
    first = shared("test", (1,), make_sessions)
    assert shared("test", (1,), make_sessions) is first
    other = shared("test", (2,), make_sessions)
    assert other is not first
    for sessions in (first, other):
        sessions.open().call("tool", {"do": lambda _: None})
    assert shared_metrics()["tools/test/tool/calls"] == 2.0
    close_shared()
    assert not shared_metrics()
    with pytest.raises(ToolFailureError, match="closed"):
        first.open().call("tool", {"do": lambda _: None})
