"""One rollout worker: a copy of the policy, an engine, and the loop that serves the trainer, wherever it runs."""

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
from openmimo.rl.rollouts.engine import EngineRollouts, EpisodeOpener
from openmimo.rl.rollouts.weight_buffer import WeightLayout, WeightSource
from openmimo.rl.scheduling.groups import GroupRequest, LateReward
from openmimo.runtime.device import resolve_device

_REPORT_SECONDS = 1.0
_IDLE_SECONDS = 0.05
_EPISODE_SECONDS = 0.005


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker has to know, apart from the weights. Can be pickled.

    Attributes:
        model_config: Of the policy.
        tokenizer: Of the policy.
        engine: Cache and drafting of the worker's engine.
        make_opener: Called once in the worker: how it opens episodes. A function of a module, or a partial of one.
        compute_dtype: Of the activations (none: that of the weights).
        reward_threads: Threads in which slow episodes answer (0: all are instant).
        environment_seconds: How long a call of an environment may take.
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
    """Tells a worker to stop these samples."""

    sample_ids: tuple[str, ...]


Order = GroupRequest | Cancel | None  # None: end


@dataclass(frozen=True)
class Report:
    """What a worker says: at once when samples came to their end, and now and then.

    Attributes:
        samples: Samples that ended, and rewards of samples that ended before.
        version: Of the weights it has now.
        idle_seconds: In which its engine had nothing to do, since the worker was ready.
        seconds: Since the worker was ready.
    """

    samples: tuple[Sample | LateReward, ...]
    version: int
    idle_seconds: float
    seconds: float


@dataclass(frozen=True)
class Failure:
    """The last word of a worker that cannot go on. is_users: by a setting, so that another worker could not either."""

    text: str
    is_users: bool


class WorkerChannel(Protocol):
    """The worker's end of its line to the trainer."""

    def receive(self, seconds: float) -> list[Order]:
        """What came in, in order; waits at most so long for something."""
        ...

    def send(self, message: Report | Failure) -> None:
        """Never waits for the trainer."""
        ...


def serve(setup: WorkerSetup, layout: WeightLayout, weights: WeightSource, channel: WorkerChannel, device: str) -> None:
    """Rolls out what comes in until the order to end. Whatever goes wrong is sent as a Failure."""
    try:
        worker = _Worker(setup, layout, weights, device)
        while worker.turn(channel):
            pass
    except UserError as error:
        channel.send(Failure(str(error), is_users=True))
    except Exception:  # told to the trainer, who starts another worker
        channel.send(Failure(traceback.format_exc(), is_users=False))


class _Worker:
    """The state of `serve`."""

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
        """Takes orders, then new weights, then one step of the engine. False after the order to end.

        In this order: an order that was sent after new weights is never begun with old ones.
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
        has_any = self._rollouts.num_running or self._rollouts.num_unscored
        samples = self._rollouts.poll() if has_any else []
        now = time.monotonic()
        if samples or now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            version = self._engine.policy_version
            channel.send(Report(tuple(samples), version, self._idle_seconds, now - self._started))
        return True

    def _orders(self, channel: WorkerChannel) -> list[Order]:
        wait_seconds = 0.0
        if not self._engine.has_work:
            has_any = self._rollouts.num_running or self._rollouts.num_unscored
            wait_seconds = _EPISODE_SECONDS if has_any else _IDLE_SECONDS
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
