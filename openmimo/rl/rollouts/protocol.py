"""The interface between the training loop and the rollouts, and the choice of a backend."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from openmimo.core.registry import Registry
from openmimo.core.samples import Sample
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.model.mimo import MiMo
from openmimo.rl.agents.episode_calls import EpisodeCalls
from openmimo.rl.config import MopdConfig, RlConfig
from openmimo.rl.scheduling.groups import GroupRequest, LateReward
from openmimo.rl.teaching.teachers import Teachers


class Rollouts(Protocol):
    """Rolls samples out: with the engine of this process, with other processes, or with workers on other machines."""

    @property
    def num_running(self) -> int:
        """Samples that were submitted and have not been returned."""
        ...

    @property
    def num_unscored(self) -> int:
        """Samples that were returned without their reward."""
        ...

    @property
    def repeats_exactly(self) -> bool:
        """Whether the same requests give the same samples in the same order."""
        ...

    @property
    def runs_while_learning(self) -> bool:
        """Whether samples continue while the trainer updates the policy."""
        ...

    def submit(self, request: GroupRequest) -> None:
        """Start the samples of a request."""
        ...

    def poll(self) -> list[Sample | LateReward]:
        """Run or wait for a moment.

        Returns:
            Samples that ended, and rewards of samples that were returned before. A sample without an error whose reward
            is NaN gets its reward later.
        """
        ...

    def interrupt(self) -> list[Sample]:
        """Stop running samples that a later request can continue, and return what the policy has written.

        Samples that no request can continue keep running, as do all samples of workers.
        """
        ...

    def cancel(self, sample_ids: list[str]) -> None:
        """Stop samples whose group has ended. They are not returned."""
        ...

    def update_weights(self, version: int) -> None:
        """Use the new weights from now on. Running samples continue with them and keep their KV cache."""
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of the rollouts since the last call, by name."""
        ...

    def close(self) -> None:
        """Stop all samples and release engines and workers."""
        ...


@dataclass(frozen=True)
class RunParts:
    """The parts of a run from which rollouts are opened.

    Attributes:
        config: The config of the run.
        model: The policy.
        tokenizer: The tokenizer of the policy.
        engine: An engine of this process with the policy.
        calls: Runs the calls of episodes in this process.
        teachers: The teachers of a distillation run.
        version: The version of the policy's weights.
    """

    config: RlConfig
    model: MiMo
    tokenizer: Tokenizer
    engine: Engine
    calls: EpisodeCalls
    teachers: Teachers | None
    version: int


@dataclass(frozen=True)
class RolloutBackend:
    """The `PLUGIN` of a file in `openmimo/rl/rollouts/backends`.

    Attributes:
        open: Starts the rollouts of a run.
    """

    open: Callable[[RunParts], Rollouts]


def open_rollouts(parts: RunParts) -> Rollouts:
    """Start the rollouts that the config of a run names: by the teachers, or by a backend with copies of the policy."""
    config = parts.config
    by_teachers = isinstance(config, MopdConfig) and config.writer == "teacher"
    backends = Registry("openmimo.rl.rollouts.backends", RolloutBackend)
    return backends.get("teachers" if by_teachers else config.rollouts).open(parts)
