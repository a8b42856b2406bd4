"""What a run of post-training learns with: trainer, engine, rollouts and teachers of one policy.

`LocalLearner` has all of it in one process. `rl.ranks.lead.Lead` has the same interface for a run on several devices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from rich.console import Console

from openmimo.core.samples import Sample
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.mimo import MiMo
from openmimo.rl.agents.environment import open_environment
from openmimo.rl.agents.episode_calls import EpisodeCalls
from openmimo.rl.algorithm import algorithm_of
from openmimo.rl.config import MopdConfig, RlConfig
from openmimo.rl.evaluate import HeldOut, roll_out_held_out
from openmimo.rl.learning.policy_trainer import Objective, PolicyTrainer, Sharing, UpdateReport, weighted_sum
from openmimo.rl.rollouts.protocol import Rollouts, RunParts, open_rollouts
from openmimo.rl.teaching.teachers import Distillation
from openmimo.train.checkpoint import Progress, load_optimizer_state, optimizer_state
from openmimo.train.optim import StepGuard


class Trainer(Protocol):
    """The part of `PolicyTrainer` that the loop calls; see there."""

    @property
    def guard(self) -> StepGuard:
        """See `PolicyTrainer`."""
        ...

    @property
    def trains_heads(self) -> bool:
        """See `PolicyTrainer`."""
        ...

    def logprobs(self, samples: list[Sample]) -> list[np.ndarray]:
        """See `PolicyTrainer`."""
        ...

    def update(
        self,
        samples: list[Sample],
        objective: Objective,
        *,
        learning_rate: float,
        version: int,
        old_logprobs: Sequence[np.ndarray] | None = None,
        pack_key: Callable[[Sample], str] = lambda sample: "",
        gate: Mapping[str, float] | None = None,
    ) -> UpdateReport:
        """See `PolicyTrainer`."""
        ...

    def check_weights(self, where: str) -> None:
        """See `PolicyTrainer`."""
        ...


class Learner(Protocol):
    """What the loop of a run calls."""

    @property
    def trainer(self) -> Trainer:
        """Updates the policy."""
        ...

    @property
    def engine(self) -> Engine:
        """An engine of this process with the policy."""
        ...

    @property
    def calls(self) -> EpisodeCalls:
        """Runs the calls of episodes in this process."""
        ...

    @property
    def distillation(self) -> Distillation | None:
        """The teachers of a distillation run."""
        ...

    @property
    def rollouts(self) -> Rollouts:
        """Roll out samples."""
        ...

    def objective(self) -> Objective:
        """The loss of a micro-batch."""
        ...

    def update_weights(self, version: int) -> None:
        """Let the rollouts use the new weights from now on."""
        ...

    def roll_out_held_out(self) -> HeldOut:
        """Roll out the held-out problems of the config."""
        ...

    def saved(self, *, with_optimizer: bool = True) -> tuple[MiMo, dict[str, torch.Tensor]]:
        """The whole model and the tensors of its optimizer."""
        ...


@dataclass(frozen=True)
class Part:
    """What a process of several has of the policy. The default is that of one process.

    Attributes:
        sharing: How the processes share the model of the trainer.
        copy: The model of the engine (None: that of the trainer).
        like: Distributes a tensor as a parameter is.
        placement: Where teachers are, see `MopdConfig.teacher_placement`; never "auto" (None: as in the config).
        shard: Distributes a teacher over the processes in place (None: one process).
        rank: The number of this process.
        num_ranks: The number of processes.
        opens_rollouts: Whether this process rolls out, or starts workers that do. Others have no engine.
    """

    sharing: Sharing | None = None
    copy: MiMo | None = None
    like: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda parameter, value: value
    placement: str | None = None
    shard: Callable[[MiMo], None] | None = None
    rank: int = 0
    num_ranks: int = 1
    opens_rollouts: bool = True


class LocalLearner:
    """The learner of this process; see `Learner`."""

    engine: Engine
    rollouts: Rollouts

    def __init__(
        self,
        config: RlConfig,
        model: MiMo,
        tokenizer: Tokenizer,
        *,
        start: Progress,
        optimizer_tensors: dict[str, torch.Tensor] | None = None,
        console: Console,
        part: Part | None = None,
    ):
        """
        Args:
            config: The config of the run.
            model: The policy.
            tokenizer: The tokenizer of the policy.
            start: The progress in the checkpoint.
            optimizer_tensors: The state of the optimizer in the checkpoint, whole.
            console: Prints warnings.
            part: What this process has of the policy, which is distributed already (None: one process).

        Raises:
            UserError: Settings contradict each other or the model.
        """
        self.config, self.model, self._part = config, model, part or Part()
        self._algorithm, self._options = algorithm_of(config)
        if part is None:
            checkpoint_activations(model.model, config.activations, recompute=config.activation_checkpointing)
        self.trainer = self._open_trainer(start, optimizer_tensors)
        opened = [open_environment(source.environment, source.options) for source in config.sources]
        instant = all(environment.is_instant(options) for environment, options in opened)
        self.calls = EpisodeCalls(threads=0 if instant else config.reward_threads, seconds=config.environment_seconds)
        self.distillation: Distillation | None = None
        if isinstance(config, MopdConfig):
            named = "resident" if config.teacher_placement == "auto" else config.teacher_placement
            placement = self._part.placement or named
            self.distillation = Distillation(
                config,
                model,
                console,
                placement=placement,
                shard=self._part.shard,
                rank=self._part.rank,
                num_ranks=self._part.num_ranks,
            )
        if self._part.opens_rollouts:
            self.engine = Engine(self._part.copy or model, tokenizer, config.engine)
            self.engine.update_weights(None, version=start.step)
            teachers = self.distillation.teachers if self.distillation else None
            parts = RunParts(config, self.engine.model, tokenizer, self.engine, self.calls, teachers, start.step)
            self.rollouts = open_rollouts(parts)

    def objective(self) -> Objective:
        """See `Learner`."""
        if self.distillation is not None and self.distillation.objective is not None:
            return self.distillation.objective
        return weighted_sum(lambda token_batch: self._algorithm.token_losses(token_batch, self._options))

    def update_weights(self, version: int) -> None:
        """See `Learner`."""
        self.rollouts.update_weights(version)

    def roll_out_held_out(self, problems: Sequence[int] | None = None) -> HeldOut:
        """Roll out held-out problems: those with the given indices (None: all of the config)."""
        config = self.config
        # with unfinished="partial", the engine may hold samples that continue in the next step
        engine = self.engine
        if engine.has_work:
            assert engine.tokenizer is not None
            engine = Engine(engine.model, engine.tokenizer, config.engine)
        return roll_out_held_out(
            engine,
            config.sources,
            problems=range(config.evaluation.problems) if problems is None else problems,
            seed=config.seed,
            temperature=config.evaluation.temperature,
            calls=self.calls,
            timeout_reward=config.timeout_reward,
            thinking=config.thinking,
        )

    def saved(self, *, with_optimizer: bool = True) -> tuple[MiMo, dict[str, torch.Tensor]]:
        """See `Learner`."""
        return self.model, optimizer_state(self.model, self.trainer.optimizer) if with_optimizer else {}

    def _open_trainer(self, start: Progress, optimizer_tensors: dict[str, torch.Tensor] | None) -> PolicyTrainer:
        """The trainer of a run, with the state of its checkpoint."""
        config = self.config
        trainer = PolicyTrainer(
            self.model,
            config.optimizer,
            tokens_per_microbatch=config.tokens_per_microbatch,
            replay_routing=config.replay_routing,
            bias_rate=config.bias_rate,
            mtp_weight=config.mtp_weight,
            sharing=self._part.sharing,
        )
        if optimizer_tensors is not None:
            load_optimizer_state(self.model, trainer.optimizer, optimizer_tensors, like=self._part.like)
        trainer.guard.num_skipped = start.skipped
        trainer.guard.skipped_in_a_row = start.skipped_in_a_row
        return trainer
