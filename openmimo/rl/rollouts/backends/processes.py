"""Rollouts by worker processes of this machine, which keep running while the trainer learns.

Orders and samples go through pipes, weights through shared memory. A worker ends when the trainer's process ends.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from openmimo.model.mimo import MiMo
from openmimo.rl.rollouts.protocol import RolloutBackend, RunParts
from openmimo.rl.rollouts.remote import WorkerLostError, WorkerRollouts
from openmimo.rl.rollouts.weight_buffer import WeightBuffer, WeightLayout, layout_of, model_tensors
from openmimo.rl.rollouts.worker import Failure, Order, WorkerReport, WorkerSetup, serve, worker_setup
from openmimo.runtime.device import worker_device

_CHECK_SECONDS = 0.5
_FLUSH_SECONDS = 5.0


class ProcessRollouts(WorkerRollouts):
    """Rollouts by processes, each with a copy of the policy.

    Where there are several accelerators, workers use those after the model's.
    """

    def __init__(self, model: MiMo, setup: WorkerSetup, *, num_workers: int = 1, version: int = 0):
        """
        Args:
            model: The policy, which `update_weights` reads.
            setup: The settings of the workers.
            num_workers: The number of processes.
            version: The version of the policy's weights.

        Raises:
            UserError: There is too little shared memory for two copies of the weights.
        """
        self._model, self._setup = model, setup
        self._layout = layout_of(model)
        self._weights = WeightBuffer(self._layout)
        self._weights.write(model_tensors(model), version)
        self._threads = max(1, torch.get_num_threads() // num_workers)
        super().__init__(num_workers)

    def process_ids(self) -> list[int]:
        """The process ids of the workers."""
        return [link.process.pid for link in self._links]

    def _start(self, number: int) -> "ProcessLink":
        context = multiprocessing.get_context("spawn")
        trainer_end, worker_end = context.Pipe()
        device = str(worker_device(self._model.device, number))
        arguments = (self._setup, self._layout, self._weights, worker_end, device, self._threads, os.getpid())
        process = context.Process(target=_work, args=arguments, name=f"rollout-worker-{number}", daemon=True)
        process.start()
        worker_end.close()  # so that the pipe ends when the worker does
        return ProcessLink(process, PipeChannel(trainer_end))

    def _wait(self, links: list[Any], seconds: float) -> list[Any]:
        link_of = {link.channel.connection: link for link in links} | {link.process.sentinel: link for link in links}
        return list(dict.fromkeys(link_of[ready] for ready in wait(list(link_of), seconds)))

    def _publish(self, version: int) -> None:
        self._weights.write(model_tensors(self._model), version)


class PipeChannel:
    """One end of a pipe. A thread writes, so that two ends that both send cannot block each other."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self._outgoing: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="pipe-writer", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """Send a message. Does not fail if the other end is closed. Raises the exceptions of pickling."""
        self._outgoing.put(ForkingPickler.dumps(message))

    def receive(self, seconds: float) -> list[Any]:
        """The messages that arrived. Waits up to `seconds` for the first.

        Raises:
            EOFError, OSError: The other end is closed, and no message is left.
        """
        messages: list[Any] = []
        while self.connection.poll(0.0 if messages else seconds):
            try:
                messages.append(self.connection.recv())
            except (EOFError, OSError):
                if not messages:
                    raise
                return messages
        return messages

    def close(self) -> None:
        """Wait up to five seconds until all messages are written."""
        self._outgoing.put(None)
        self._thread.join(_FLUSH_SECONDS)

    def _write(self) -> None:
        while (item := self._outgoing.get()) is not None:
            try:
                self.connection.send_bytes(item)
            except OSError:
                return


class ProcessLink:
    """The trainer's connection to a worker process."""

    def __init__(self, process: Any, channel: PipeChannel):
        self.process, self.channel = process, channel

    def send(self, order: Order) -> None:
        self.channel.send(order)

    def receive(self) -> list[WorkerReport | Failure]:
        has_ended = not self.process.is_alive()  # before the pipe, which may hold the last messages
        try:
            messages = self.channel.receive(0.0)
        except (EOFError, OSError):
            messages, has_ended = [], True
        if has_ended and not messages:
            self.process.join(_CHECK_SECONDS)
            raise WorkerLostError(f"process {self.process.pid} ended with exit code {self.process.exitcode}")
        return messages

    def end(self, patience_seconds: float) -> None:
        self.process.join(patience_seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.channel.close()
        self.channel.connection.close()


def _work(
    setup: WorkerSetup, layout: WeightLayout, weights: WeightBuffer, connection: Connection, device: str, threads: int,
    trainer: int,
) -> None:  # fmt: skip
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer receives it as well, and ends this process
    threading.Thread(target=_end_with, args=(trainer,), name="trainer-watch", daemon=True).start()
    torch.set_num_threads(threads)
    channel = PipeChannel(connection)
    serve(setup, layout, weights, channel, device)
    channel.close()


def _end_with(trainer: int) -> None:
    """End this process as soon as the trainer's has ended."""
    while os.getppid() == trainer:
        time.sleep(_CHECK_SECONDS)
    os._exit(1)


def _open(parts: RunParts) -> ProcessRollouts:
    return ProcessRollouts(
        parts.model, worker_setup(parts), num_workers=parts.config.rollout_workers, version=parts.version
    )


PLUGIN = RolloutBackend(_open)
