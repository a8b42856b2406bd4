"""Selection of a backend for a kernel call.

An operation is a folder of backends. `operations.py` and `attention/__init__.py` define its call, its `Need` (the
properties of a call on which the selection depends) and its `Dispatcher`. Each backend is a file that exports
`PLUGIN = Backend(priority, run, refuse)`. The backend with the highest priority that does not refuse the need computes
the call. `reference` defines the operation: it refuses nothing and has priority 0. A backend that does not support a
part of a call refuses the call.

Backends in Triton import it in their first call, so that nothing on a CPU imports it.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from openmimo.core.errors import ConfigError
from openmimo.core.registry import Registry

_MAX_REMEMBERED_NEEDS = 4096  # decoding repeats about a hundred needs for every token


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation.

    The dispatcher caches the result of `refuse`, which may depend only on `need` and on constants of the process.

    Attributes:
        priority: The dispatcher tries higher priorities first.
        run: The function that computes the call, or a record of functions if the operation has several.
        refuse: Returns the reason why `run` cannot serve a need, or None if it can.
    """

    priority: int
    run: Any
    refuse: Callable[[Any], str | None]


class Dispatcher:
    """The backends of one folder.

    `choose(need)` returns the (name, backend) that serves `need`, which is hashable. It is a cached C function, because
    every decoded token calls it about a hundred times. It raises ConfigError if the forced backend refuses.

    Args:
        package: Dotted name of the folder of the backends.
        variable: Environment variable that forces a backend by name. It is read once, by the first `choose`.
    """

    def __init__(self, package: str, variable: str):
        self.package, self.variable = package, variable
        self._registry: Registry[Backend] = Registry(package, Backend)
        self._ordered: list[tuple[str, Backend]] | None = None
        self.choose: Callable[[Any], tuple[str, Backend]] = functools.lru_cache(_MAX_REMEMBERED_NEEDS)(self._choose)

    def backends(self) -> list[tuple[str, Backend]]:
        """Return every (name, backend), highest priority first."""
        if self._ordered is None:
            found = [(name, self._registry.get(name)) for name in self._registry.names()]
            self._ordered = sorted(found, key=lambda pair: -pair[1].priority)
        return self._ordered

    def best(self, need: Any) -> tuple[str, Backend]:
        """Return the backend with the highest priority that serves `need`, even if another one is forced."""
        for name, backend in self.backends():
            if backend.refuse(need) is None:
                return name, backend
        raise AssertionError("the reference backend refuses nothing")

    @functools.cached_property
    def _forced(self) -> str:
        return os.environ.get(self.variable, "")

    def _choose(self, need: Any) -> tuple[str, Backend]:
        if not (forced := self._forced):
            return self.best(need)
        backend = self._registry.get(forced)
        if reason := backend.refuse(need):
            raise ConfigError(f"{self.variable}={forced}, but this backend refuses the call: {reason}.")
        return forced, backend


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_unavailable(on_cpu: bool, dtype: torch.dtype) -> str | None:
    """Why a Triton kernel cannot serve a call; None if it can.

    Args:
        on_cpu: Whether the tensors are in CPU memory. Triton's interpreter serves them if TRITON_INTERPRET is set.
        dtype: Dtype of the products.
    """
    if on_cpu and not os.environ.get("TRITON_INTERPRET"):
        return "Triton kernels run on accelerators"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not compute {dtype}"
    if on_cpu and dtype == torch.bfloat16:
        return "Triton's interpreter does not compute bfloat16"
    return None if _is_installed() else "Triton is not installed"
