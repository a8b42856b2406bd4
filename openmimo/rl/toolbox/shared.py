"""Tool sessions that all episodes of this process share, so that they also share quotas."""

import atexit
import threading
from collections.abc import Callable, Hashable

from openmimo.core.services import Service, register_service
from openmimo.rl.toolbox.sessions import ToolSessions

_lock = threading.Lock()
_sessions: dict[tuple[str, Hashable], ToolSessions] = {}


def shared(name: str, key: Hashable, make: Callable[[], ToolSessions]) -> ToolSessions:
    """The sessions of this name and key, created at the first call.

    Args:
        name: The environment.
        key: Its options.
        make: Creates the sessions.
    """
    with _lock:
        if (name, key) not in _sessions:
            if not _sessions:
                atexit.register(close_shared)
                register_service("tools", Service(shared_metrics, close_shared))
            _sessions[name, key] = make()
        return _sessions[name, key]


def shared_metrics() -> dict[str, float]:
    """All counters as `tools/<environment>/<counter>`, summed over sessions of one environment."""
    with _lock:
        entries = list(_sessions.items())
    found: dict[str, float] = {}
    for (name, _), sessions in entries:
        for key, value in sessions.metrics().items():
            found[f"tools/{name}/{key}"] = found.get(f"tools/{name}/{key}", 0.0) + value
    return found


def close_shared() -> None:
    """Closes all shared sessions, at the end of a run. Later episodes create new ones."""
    with _lock:
        entries = list(_sessions.values())
        _sessions.clear()
    for sessions in entries:
        sessions.close()
