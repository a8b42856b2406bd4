"""Rollouts by Ray actors on one or more machines, which keep running while the trainer learns. Needs the extra `ray`.

Ray places the actors. Weights go through its object store, once to each machine.
"""

import queue
import threading
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from openmimo.core.errors import ConfigError
from openmimo.model.mimo import MiMo
from openmimo.rl.rollouts.protocol import RolloutBackend, RunParts
from openmimo.rl.rollouts.remote import WorkerLostError, WorkerRollouts
from openmimo.rl.rollouts.weight_buffer import Take, WeightLayout, layout_of, model_tensors
from openmimo.rl.rollouts.worker import Failure, Order, WorkerReport, WorkerSetup, serve, worker_setup

_LISTEN_SECONDS = 0.05


class RayRollouts(WorkerRollouts):
    """Rollouts by Ray actors, each with a copy of the policy."""

    def __init__(
        self,
        model: MiMo,
        setup: WorkerSetup,
        *,
        num_workers: int = 1,
        version: int = 0,
        actor_options: Mapping[str, Any] | None = None,
    ):
        """
        Connects to the cluster that RAY_ADDRESS names, or starts Ray on this machine, unless Ray is initialized.

        Args:
            model: The policy, which `update_weights` reads.
            setup: The settings of the workers.
            num_workers: The number of actors.
            version: The version of the policy's weights.
            actor_options: Options of `ray.remote`; by default one CPU for each actor, and one accelerator if the model
                is on one.

        Raises:
            ConfigError: Ray is not installed.
        """
        try:
            import ray
        except ImportError as error:
            raise ConfigError("Rollouts on a cluster need Ray: pip install 'openmimo[ray]'") from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        self._ray, self._model = ray, model
        self._layout = layout_of(model)
        options = {"num_cpus": 1, "num_gpus": int(model.device.type != "cpu"), **(actor_options or {})}
        self._actor_class = ray.remote(**options)(ActorBody)
        device = "cpu" if not options["num_gpus"] else "auto"
        self._arguments = (ray.put(setup), self._layout, device, int(max(1, options["num_cpus"])))
        self._links: list[RayLink] = []
        self._publish(version)
        super().__init__(num_workers)

    def _start(self, number: int) -> "RayLink":
        link = RayLink(self._ray, self._actor_class.remote(*self._arguments))
        link.give_weights(self._weights)
        return link

    def _wait(self, links: list[Any], seconds: float) -> list[Any]:
        link_of = {link.listening(): link for link in links}
        self._ray.wait(list(link_of), num_returns=1, timeout=seconds)
        ready, _ = self._ray.wait(list(link_of), num_returns=len(link_of), timeout=0.0)  # all ready ones
        return [link_of[reference] for reference in ready]

    def _publish(self, version: int) -> None:
        memory = torch.empty(self._layout.num_bytes, dtype=torch.uint8)
        self._layout.write(memory, model_tensors(self._model))
        self._weights = (
            version,
            [self._ray.put(memory.numpy())],
        )  # Ray keeps references in a list as they are
        for link in self._links:
            link.give_weights(self._weights)


class RayLink:
    """The trainer's connection to an actor."""

    def __init__(self, ray: Any, actor: Any):
        self._ray, self._actor = ray, actor
        self._listening: Any = None

    def send(self, order: Order) -> None:
        self._actor.order.remote(order)

    def give_weights(self, weights: tuple[int, list[Any]]) -> None:
        """Send the reference of new weights. The actor takes them before any later order."""
        self._actor.renew.remote(*weights)

    def listening(self) -> Any:
        """The Ray reference of the actor's next messages."""
        if self._listening is None:
            self._listening = self._actor.listen.remote()
        return self._listening

    def receive(self) -> list[WorkerReport | Failure]:
        reference, self._listening = self.listening(), None
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise WorkerLostError(str(error)) from error

    def end(self, patience_seconds: float) -> None:
        if patience_seconds:
            self._ray.wait([self._actor.finish.remote()], timeout=patience_seconds)
        self._ray.kill(self._actor)


class ActorBody:
    """The body of an actor: `serve` in a thread, and methods that pass orders in and reports out, one at a time."""

    def __init__(self, setup: WorkerSetup, layout: WeightLayout, device: str, threads: int):
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        self._weights = ObjectWeights(layout)
        self._channel = QueueChannel()
        self._thread = threading.Thread(
            target=self._serve, args=(setup, layout, device, threads), name="rollout-worker", daemon=True
        )

    def renew(self, version: int, reference: list[Any]) -> None:
        """Store the reference of new weights. The first one starts the worker."""
        self._weights.newest = (version, reference[0])
        if not self._thread.is_alive() and self._thread.ident is None:
            self._thread.start()

    def order(self, order: Order) -> None:
        """Pass an order to the worker."""
        self._channel.orders.put(order)

    def listen(self) -> list[WorkerReport | Failure]:
        """The worker's messages since the last call. Waits up to 0.05 seconds for the first."""
        return _take_all(self._channel.messages, _LISTEN_SECONDS)

    def finish(self) -> None:
        """Wait for the worker to end."""
        if self._thread.ident is not None:
            self._thread.join()

    def _serve(self, setup: WorkerSetup, layout: WeightLayout, device: str, threads: int) -> None:
        torch.set_num_threads(threads)  # applies to the calling thread
        serve(setup, layout, self._weights, self._channel, device)


class ObjectWeights:
    """Weights in Ray's object store.

    Attributes:
        newest: The newest version, and the reference of its flat memory.
    """

    def __init__(self, layout: WeightLayout):
        self._layout = layout
        self.newest: tuple[int, Any] = (-1, None)

    @property
    def version(self) -> int:
        return self.newest[0]

    def read(self, take: Take) -> None:
        """Objects in the store are immutable, so one read is enough."""
        import ray

        version, reference = self.newest
        memory: np.ndarray = ray.get(reference)
        take(self._layout.views(torch.from_numpy(memory)), version)


class QueueChannel:
    """The worker's connection to the methods of its actor."""

    def __init__(self) -> None:
        self.orders: queue.SimpleQueue = queue.SimpleQueue()
        self.messages: queue.SimpleQueue = queue.SimpleQueue()

    def receive(self, seconds: float) -> list[Order]:
        return _take_all(self.orders, seconds)

    def send(self, message: WorkerReport | Failure) -> None:
        self.messages.put(message)


def _take_all(items: queue.SimpleQueue, seconds: float) -> list[Any]:
    """All items of the queue. Waits up to `seconds` for the first."""
    taken: list[Any] = []
    try:
        taken.append(items.get(timeout=seconds) if seconds else items.get_nowait())
        while True:
            taken.append(items.get_nowait())
    except queue.Empty:
        return taken


def _open(parts: RunParts) -> RayRollouts:
    return RayRollouts(
        parts.model, worker_setup(parts), num_workers=parts.config.rollout_workers, version=parts.version
    )


PLUGIN = RolloutBackend(_open)
