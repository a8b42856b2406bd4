"""Choosing how a kernel call is computed.

An operation is a folder of backends. Each states what it refuses and why; the one with the lowest rank that does not
refuse runs. `reference` refuses nothing and has the worst rank, so there is always an answer. A backend never ignores
a part of the call: it computes it, or refuses.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openmimo.core.errors import ConfigError
from openmimo.core.registry import Registry

_REMEMBERED_NEEDS = 4096  # decoding asks the same a hundred times a token


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation. `refuse(need)` gives a reason, or None if `run` can serve the call.

    The answer is remembered, so it depends on `need` and on what stays as it is while the process runs.
    """

    rank: int
    run: Callable[..., Any]
    refuse: Callable[[Any], str | None]


class Dispatcher:
    """The backends of one folder, fastest first.

    The environment variable `variable` forces one by name. It is read at the first choice and kept: reading it for
    every call takes longer than the choice itself.
    """

    def __init__(self, package: str, variable: str):
        self._registry: Registry[Backend] = Registry(package, Backend)
        self._variable = variable
        self._ordered: list[tuple[str, Backend]] | None = None
        self._remembered = functools.lru_cache(maxsize=_REMEMBERED_NEEDS)(self._choose)

    def backends(self) -> list[tuple[str, Backend]]:
        """Every (name, backend), best rank first."""
        if self._ordered is None:
            found = [(name, self._registry.get(name)) for name in self._registry.names()]
            self._ordered = sorted(found, key=lambda pair: pair[1].rank)
        return self._ordered

    def choose(self, need: Any) -> tuple[str, Backend]:
        """The fastest backend that serves `need` (hashable). Raises ConfigError if the one that is forced refuses."""
        return self._remembered(need)

    @functools.cached_property
    def _forced(self) -> str:
        return os.environ.get(self._variable, "")

    def _choose(self, need: Any) -> tuple[str, Backend]:
        if forced := self._forced:
            backend = self._registry.get(forced)
            if reason := backend.refuse(need):
                raise ConfigError(f"{self._variable}={forced}, but this backend refuses the call: {reason}.")
            return forced, backend
        return self.fastest(need)

    def fastest(self, need: Any) -> tuple[str, Backend]:
        """The fastest backend that serves `need`, whichever is forced."""
        for name, backend in self.backends():
            if backend.refuse(need) is None:
                return name, backend
        raise AssertionError("the reference backend refuses nothing")
