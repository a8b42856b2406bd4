"""Process-wide services that plug-ins start on demand, such as tool pools and isolated scorers.

A run records the metrics of all services and closes them at its end, without importing the services themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Service:
    """The hooks of a service. Both may be called at any time, from any thread.

    Attributes:
        metrics: Returns the current counters by metric name.
        close: Releases the resources of a run. The service starts again when it is used again.
    """

    metrics: Callable[[], dict[str, float]]
    close: Callable[[], None] = _nothing


_SERVICES: dict[str, Service] = {}


def register_service(name: str, service: Service) -> None:
    """Register a service. A second registration under the same name replaces the first."""
    _SERVICES[name] = service


def service_metrics() -> dict[str, float]:
    """Return the counters of all services."""
    return {key: value for service in list(_SERVICES.values()) for key, value in service.metrics().items()}


def close_services() -> None:
    """Close all services at the end of a run."""
    for service in list(_SERVICES.values()):
        service.close()
