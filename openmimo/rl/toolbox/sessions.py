"""The tools of one episode: its environment, its calls, and the computation of its reward.

This is the Tool Manager of the paper (section 4.6.3): it works next to the rollout engine, prepares environments,
starts the reward of a finished sequence without waiting for others, recovers from time-outs, and counts. The Toolbox
enforces global limits.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from openmimo.rl.toolbox.box import Toolbox
from openmimo.rl.toolbox.records import ToolFailureError, ToolResult
from openmimo.rl.toolbox.warm import WarmEnvironments

REWARD_ATTEMPTS = 2


class ToolSessions:
    """Opens sessions on a toolbox, which it owns. Use it as a context manager, or close it.

    Args:
        toolbox: The tools.
        environments: Each session takes one environment at its first call. None if the tools need none.
        patience_seconds: Maximum wait of a session for its environment.
    """

    def __init__(self, toolbox: Toolbox, environments: WarmEnvironments | None = None, patience_seconds: float = 300.0):
        self.toolbox, self.environments, self.patience_seconds = toolbox, environments, patience_seconds
        self.num_opened = self.num_reward_retries = self.num_lost_environments = 0
        self._open: set[ToolSession] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> "ToolSessions":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def open(self, prepare: Callable[[Any], None] = lambda environment: None) -> "ToolSession":
        """Opens a session for one episode. `prepare` initializes its environment before the first call."""
        self.count(num_opened=1)
        session = ToolSession(self, prepare)
        with self._lock:
            self._open.add(session)
        return session

    def metrics(self) -> dict[str, float]:
        """The counters of sessions, environments and tools."""
        names = ("opened", "reward_retries", "lost_environments")
        with self._lock:
            found = {f"sessions/{name}": float(getattr(self, f"num_{name}")) for name in names}
            found["sessions/open"] = float(len(self._open))
        return found | (self.environments.metrics() if self.environments else {}) | self.toolbox.metrics()

    def close(self) -> None:
        """Closes all sessions, the toolbox and the environments."""
        with self._lock:
            sessions = list(self._open)
        for session in sessions:
            session.close()
        self.toolbox.close()
        if self.environments is not None:
            self.environments.close()

    def forget(self, session: "ToolSession") -> None:
        """Removes a closed session."""
        with self._lock:
            self._open.discard(session)

    def count(self, **more: int) -> None:
        """Adds to counters by name."""
        with self._lock:
            for name, amount in more.items():
                setattr(self, name, getattr(self, name) + amount)


class ToolSession:
    """The tools of one episode. Calls must be sequential; `close` may be called at any time from another thread.

    The environment is released when the session is closed and its last call has ended, which may be after the caller
    timed out. Tools receive it as the argument "environment".
    """

    def __init__(self, sessions: ToolSessions, prepare: Callable[[Any], None]):
        self._sessions, self._prepare = sessions, prepare
        self._environment: Any = None
        self._num_calls = 0
        self._reward: Future[Any] | None = None
        self._cancelled = threading.Event()
        self._lock = threading.Lock()

    def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Calls a tool. Mistakes of the model are part of the result, and so are time-outs without an environment.

        A call that times out leaves its environment in an unknown state. It raises ToolFailureError, and the episode
        should be rolled out again. Tools that run model-written code should therefore have a shorter limit of their
        own, and report it to the model.
        """
        self._begin()
        extra = {} if self._sessions.environments is None else {"environment": self._environment}
        result = self._sessions.toolbox.call(name, {**arguments, **extra}, cancelled=self._cancelled, on_end=self._end)
        if result.error == "timeout" and extra:
            self._sessions.count(num_lost_environments=1)
            self.close()
            raise ToolFailureError(f"tool {name!r}: {result.value}; its environment is discarded")
        return result

    def start_reward(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Starts to score the episode by a tool in a new thread. `reward` waits for the result."""
        self._reward = Future()
        thread = threading.Thread(
            target=self._score, args=(self._reward, name, arguments), name="tool-reward", daemon=True
        )
        thread.start()

    def reward(self) -> Any:
        """The result of the scoring tool. Raises ToolFailureError if it failed."""
        if self._reward is None:
            raise ToolFailureError("the reward was not started")
        return self._reward.result()

    def close(self) -> None:
        """Closes the session. May be called repeatedly. A waiting call is cancelled; a running call ends first."""
        with self._lock:
            if self._cancelled.is_set():
                return
            self._cancelled.set()
        self._sessions.forget(self)
        self._release()

    def _begin(self) -> None:
        """Counts a call, and takes the environment at the first call."""
        with self._lock:
            if self._cancelled.is_set():
                raise ToolFailureError("the session is closed")
            self._num_calls += 1
        environments = self._sessions.environments
        if environments is None or self._environment is not None:
            return
        try:
            self._environment = environments.take(self._sessions.patience_seconds)
            self._prepare(self._environment)
        except BaseException:
            self._end()
            self.close()
            raise

    def _end(self) -> None:
        with self._lock:
            self._num_calls -= 1
        self._release()

    def _release(self) -> None:
        """Releases the environment if the session is closed and no call uses it."""
        with self._lock:
            if not self._cancelled.is_set() or self._num_calls or self._environment is None:
                return
            environment, self._environment = self._environment, None
        assert self._sessions.environments is not None
        self._sessions.environments.give_back(environment)

    def _score(self, future: "Future[Any]", name: str, arguments: Mapping[str, Any]) -> None:
        try:
            future.set_result(self._scored(name, arguments))
        except BaseException as error:  # `reward` raises it
            future.set_exception(error)

    def _scored(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Scores, with one retry because scoring has no side effects. A closed session fails immediately."""
        for attempt in range(1, REWARD_ATTEMPTS + 1):
            try:
                result = self.call(name, arguments)
            except ToolFailureError:
                if attempt == REWARD_ATTEMPTS or self._cancelled.is_set():
                    raise
            else:
                if not result.error:
                    return result.value
                if attempt == REWARD_ATTEMPTS or result.error == "mistake":
                    raise ToolFailureError(f"scoring by {name!r} failed: {result.value}")
            self._sessions.count(num_reward_retries=1)
        raise AssertionError("unreachable")
