"""Workers as Ray actors on a cluster, with the interface of `WorkerPool`. Needs the extra `ray`.

They serve tools whose arguments and results can be pickled, such as a search service. The environment of an episode (a
working folder) stays in the rollout process, and so do the tools that need it.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from openmimo.core.errors import ConfigError
from openmimo.rl.toolbox.records import ToolFailureError, ToolMistakeError, WorkerTimeoutError
from openmimo.rl.toolbox.workers import IdleWorkers, Worker


class RayWorkers:
    """One actor per worker. Hanging actors are killed and dead actors replaced. The caller runs `ray.init`.

    Args:
        make_worker: A picklable factory (a function or class of a module, or a partial of one).
        size: Number of workers.
        actor_options: For `ray.remote`, such as {"num_cpus": 0.1, "resources": {"tools": 1}}.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, make_worker: Callable[[], Worker], size: int, actor_options: Mapping[str, Any] | None = None):
        try:
            import ray
        except ImportError as error:
            raise ConfigError("Tools on a cluster need Ray: pip install 'openmimo[ray]'") from error
        self.num_restarts = 0
        self._ray, self._make_worker = ray, make_worker
        self._actor_class = ray.remote(**{"num_cpus": 0, **(actor_options or {})})(ActorBody)
        self._idle = IdleWorkers()
        for _ in range(size):
            self._idle.put(self._actor_class.remote(make_worker))

    def take(self, patience_seconds: float, cancelled: threading.Event) -> Any:
        return self._idle.take(patience_seconds, cancelled)

    def give_back(self, worker: Any) -> None:
        if not self._idle.put(worker):
            self._ray.kill(worker)

    def run(self, worker: Any, arguments: Mapping[str, Any], timeout_seconds: float, on_end: Callable[[], None]) -> Any:
        """Runs a taken worker, then returns or replaces it. The start of a new actor counts towards the deadline."""
        try:
            kind, value = self._ray.get(worker.call.remote(dict(arguments)), timeout=timeout_seconds)
        except self._ray.exceptions.GetTimeoutError:
            self._replace(worker)
            raise WorkerTimeoutError(f"the call took longer than {timeout_seconds:g} seconds") from None
        except Exception as error:  # a dead actor, a lost node, arguments that cannot be pickled
            self._replace(worker)
            raise ToolFailureError(f"the actor failed: {error!r}") from error
        finally:
            on_end()
        if kind == "failure":
            self._replace(worker)
            raise ToolFailureError(f"the worker failed: {value}")
        self.give_back(worker)
        if kind == "mistake":
            raise ToolMistakeError(value)
        return value

    def close(self) -> None:
        for worker in self._idle.close():
            self._ray.kill(worker)

    def _replace(self, worker: Any) -> None:
        self._ray.kill(worker)
        self.num_restarts += 1
        self.give_back(self._actor_class.remote(self._make_worker))


class ActorBody:
    """The class of the actors."""

    def __init__(self, make_worker: Callable[[], Worker]):
        self._worker = make_worker()

    def call(self, arguments: Mapping[str, Any]) -> tuple[str, Any]:
        """("answer", value), ("mistake", text) or ("failure", text), so that exceptions need not be picklable."""
        try:
            return "answer", self._worker.call(arguments)
        except ToolMistakeError as mistake:
            return "mistake", str(mistake)
        except Exception as error:  # reported to the caller, who replaces this actor
            return "failure", repr(error)
