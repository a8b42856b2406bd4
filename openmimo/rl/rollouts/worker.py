"""A rollout worker: a copy of the policy, an engine, and the loop that serves the trainer."""

import functools
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from openmimo.core.errors import UserError
from openmimo.core.samples import Sample
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.model.config import ModelConfig
from openmimo.rl.agents.episode_calls import EpisodeCalls
from openmimo.rl.evaluate import episode_opener
from openmimo.rl.rollouts.engine import EngineRollouts, EpisodeOpener
from openmimo.rl.rollouts.protocol import RunParts
from openmimo.rl.rollouts.weight_buffer import WeightLayout, WeightSource
from openmimo.rl.scheduling.groups import GroupRequest, LateReward
from openmimo.runtime.device import resolve_device

_REPORT_SECONDS = 1.0
_IDLE_SECONDS = 0.05
_EPISODE_SECONDS = 0.005


@dataclass(frozen=True)
class WorkerSetup:
    """The settings of a worker, without the weights. Can be pickled.

    Attributes:
        model_config: The configuration of the policy.
        tokenizer: The tokenizer of the policy.
        engine: Cache and drafting of the worker's engine.
        make_opener: Called once in the worker; returns the function that opens episodes. A function of a module, or a
            partial of one.
        compute_dtype: The dtype of activations (None: that of the weights).
        reward_threads: Threads for calls of slow episodes (0: all episodes are instant).
        environment_seconds: Deadline of one call of an environment.
        timeout_reward: See EngineRollouts.
        thinking: See EngineRollouts.
        seed: See EngineRollouts.
        record_routing: See EngineRollouts.
    """

    model_config: ModelConfig
    tokenizer: Tokenizer
    engine: EngineConfig
    make_opener: Callable[[], EpisodeOpener]
    compute_dtype: torch.dtype | None = None
    reward_threads: int = 0
    environment_seconds: float = 300.0
    timeout_reward: float | None = None
    thinking: bool = False
    seed: int = 0
    record_routing: bool = True


@dataclass(frozen=True)
class Cancel:
    """The order to stop these samples."""

    sample_ids: tuple[str, ...]


Order = GroupRequest | Cancel | None  # None: end the worker


@dataclass(frozen=True)
class WorkerReport:
    """A message of a worker: at once when samples have ended, and otherwise every second.

    Attributes:
        samples: Samples that ended, and rewards of samples that ended before.
        version: The version of its weights.
        idle_seconds: Time in which its engine had no work since the worker was ready.
        seconds: Time since the worker was ready.
    """

    samples: tuple[Sample | LateReward, ...]
    version: int
    idle_seconds: float
    seconds: float


@dataclass(frozen=True)
class Failure:
    """The last message of a worker that cannot continue.

    Attributes:
        text: The error.
        is_users: The cause is a setting, so that another worker would fail in the same way.
    """

    text: str
    is_users: bool


class WorkerChannel(Protocol):
    """The worker's connection to the trainer."""

    def receive(self, seconds: float) -> list[Order]:
        """The orders that arrived, in order. Waits up to `seconds` for the first."""
        ...

    def send(self, message: WorkerReport | Failure) -> None:
        """Send a message without waiting for the trainer."""
        ...


def worker_setup(parts: RunParts) -> WorkerSetup:
    """The settings of the workers of a run."""
    config = parts.config
    return WorkerSetup(
        parts.model.config,
        parts.tokenizer,
        config.engine,
        functools.partial(episode_opener, config.sources),
        compute_dtype=parts.model.compute_dtype,
        reward_threads=0 if parts.calls.is_instant else config.reward_threads,
        environment_seconds=config.environment_seconds,
        timeout_reward=config.timeout_reward,
        thinking=config.thinking,
        seed=config.seed,
    )


def serve(setup: WorkerSetup, layout: WeightLayout, weights: WeightSource, channel: WorkerChannel, device: str) -> None:
    """Roll out requests until the order to end. An exception is sent as a Failure."""
    try:
        worker = _Worker(setup, layout, weights, device)
        while worker.turn(channel):
            pass
    except UserError as error:
        channel.send(Failure(str(error), is_users=True))
    except Exception:  # the trainer starts another worker
        channel.send(Failure(traceback.format_exc(), is_users=False))


class _Worker:
    """The engine and the rollouts of `serve`."""

    def __init__(self, setup: WorkerSetup, layout: WeightLayout, weights: WeightSource, device: str):
        model = layout.empty_model(setup.model_config, resolve_device(device))
        model.compute_dtype = setup.compute_dtype
        self._weights = weights
        self._engine = Engine(model, setup.tokenizer, setup.engine)
        self._calls = EpisodeCalls(threads=setup.reward_threads, seconds=setup.environment_seconds)
        self._rollouts = EngineRollouts(
            self._engine,
            setup.make_opener(),
            calls=self._calls,
            timeout_reward=setup.timeout_reward,
            thinking=setup.thinking,
            seed=setup.seed,
            record_routing=setup.record_routing,
            late_rewards=setup.reward_threads > 0,
        )
        self._take_weights()
        self._started = self._reported = time.monotonic()
        self._idle_seconds = 0.0

    def turn(self, channel: WorkerChannel) -> bool:
        """Take orders, then new weights, then one step of the engine. Returns False after the order to end.

        Weights are read after orders, so that an order sent after new weights never starts with old ones.
        """
        for order in self._orders(channel):
            if order is None:
                self._rollouts.close()
                self._calls.close()
                return False
            if isinstance(order, Cancel):
                self._rollouts.cancel(list(order.sample_ids))
            else:
                self._rollouts.submit(order)
        samples = self._rollouts.poll() if self._has_samples() else []
        now = time.monotonic()
        if samples or now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            version = self._engine.policy_version
            channel.send(WorkerReport(tuple(samples), version, self._idle_seconds, now - self._started))
        return True

    def _has_samples(self) -> bool:
        return bool(self._rollouts.num_running or self._rollouts.num_unscored)

    def _orders(self, channel: WorkerChannel) -> list[Order]:
        wait_seconds = 0.0
        if not self._engine.has_work:
            wait_seconds = _EPISODE_SECONDS if self._has_samples() else _IDLE_SECONDS
        before = time.monotonic()
        orders = channel.receive(wait_seconds)
        if wait_seconds:
            self._idle_seconds += time.monotonic() - before
        if self._weights.version != self._engine.policy_version:
            self._take_weights()
        return orders

    def _take_weights(self) -> None:
        self._weights.read(
            lambda tensors, version: self._engine.update_weights(tensors, version=version, recompute=False)
        )
