"""Workers as actors: with Ray if it is installed, and with a stand-in of the same interface."""

import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError

import pytest

from openmimo.core.errors import ConfigError
from openmimo.rl.toolbox import Tool, Toolbox, ToolFailureError, ToolLimits, ToolMistakeError
from openmimo.rl.toolbox.ray_pool import RayWorkers


class Moody:
    """A worker that does what the call names."""

    def call(self, arguments):
        if arguments["do"] == "mistake":
            raise ToolMistakeError("odd")
        if arguments["do"] == "break":
            raise ValueError("broke")
        if arguments["do"] == "hang":
            threading.Event().wait(arguments["seconds"])
        return arguments["do"]

    def close(self):
        pass


class StandIn(types.ModuleType):
    """The used part of `ray`: actors in threads."""

    def __init__(self):
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(GetTimeoutError=LateError)
        self.killed = []

    def remote(self, **options):
        return lambda body: types.SimpleNamespace(remote=lambda *arguments: self._actor(body(*arguments)))

    def _actor(self, body):
        thread = ThreadPoolExecutor(1)
        call = types.SimpleNamespace(remote=lambda arguments: thread.submit(body.call, arguments))
        return types.SimpleNamespace(call=call, thread=thread)

    def get(self, future, timeout):
        return future.result(timeout)

    def kill(self, actor):
        actor.thread.shutdown(wait=False)
        self.killed.append(actor)


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def check_box(box, hang_seconds):
    assert box.call("tool", {"do": "work"}).value == "work"
    assert box.call("tool", {"do": "mistake"}).text == "error: odd"
    with pytest.raises(ToolFailureError, match="failed"):
        box.call("tool", {"do": "break"})
    assert box.call("tool", {"do": "work"}).value == "work"
    ended = []
    assert box.call("tool", {"do": "hang", "seconds": hang_seconds}, on_end=lambda: ended.append(1)).error == "timeout"
    assert ended == [1]
    assert box.metrics()["tool/restarts"] == 2.0


def test_actors_of_a_stand_in(stand_in):
    with Toolbox({"tool": Tool(Moody, ToolLimits(quota=1, timeout_seconds=0.1))}, RayWorkers) as box:
        check_box(box, hang_seconds=1.0)
        assert box.call("tool", {"do": "work"}).value == "work"
    assert len(stand_in.killed) == 3


@pytest.mark.slow
def test_actors_of_ray():
    ray = pytest.importorskip("ray")
    found_here = {"env_vars": {"PYTHONPATH": ":".join(filter(None, sys.path))}}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=found_here)
    try:
        with Toolbox({"tool": Tool(Moody, ToolLimits(quota=1, timeout_seconds=20.0))}, RayWorkers) as box:
            check_box(box, hang_seconds=600.0)
    finally:
        ray.shutdown()


def test_without_ray_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install"):
        RayWorkers(Moody, 1)
