"""One process of a run on several devices: its shard of the policy, its engine, and the orders that it executes."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor

from openmimo.core.errors import stop_requests
from openmimo.core.services import close_services
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.mimo import MiMo
from openmimo.parallel.ranks import Ranks
from openmimo.rl.config import RlConfig
from openmimo.rl.learner import LocalLearner, Part
from openmimo.rl.learning.policy_trainer import PackPlan, Sharing, StepSums, score_pack
from openmimo.rl.ranks.orders import (
    Channel,
    CheckOrder,
    EndOrder,
    GatherOrder,
    HeldOutOrder,
    Order,
    RolloutOrder,
    ScoreOrder,
    StepOrder,
    WeightsOrder,
    answer,
)
from openmimo.rl.rollouts.weight_buffer import model_tensors
from openmimo.rl.rollouts.worker import Cancel
from openmimo.train.checkpoint import Progress, optimizer_state

_BUCKET_BYTES = 64 << 20


class Member:
    """One process of a run.

    Attributes:
        ranks: Its part of the mesh.
        learner: Its trainer, engine, rollouts and teachers.
        gathered: On the leading process, the result of the last GatherOrder.
    """

    def __init__(
        self,
        config: RlConfig,
        model: MiMo,
        tokenizer: Tokenizer,
        ranks: Ranks,
        *,
        start: Progress,
        optimizer_tensors: dict[str, torch.Tensor] | None,
        placement: str,
        console: Console,
    ):
        """
        Args:
            config: The config of the run.
            model: The policy, whole; it is distributed in place.
            tokenizer: The tokenizer of the policy.
            ranks: The part of this process in the mesh.
            start: The progress in the checkpoint.
            optimizer_tensors: The state of the optimizer in the checkpoint, whole.
            placement: Where the teachers are.
            console: Prints warnings.

        Raises:
            UserError: Settings contradict each other, the model or the mesh.
        """
        self.ranks = ranks
        self._has_engine = config.rollouts == "engine" or ranks.is_main
        engine_model = copy.deepcopy(model).requires_grad_(False) if self._has_engine else None
        checkpoint_activations(model.model, config.activations, recompute=config.activation_checkpointing)
        ranks.apply(model)
        self.learner = LocalLearner(
            config,
            model,
            tokenizer,
            start=start,
            optimizer_tensors=optimizer_tensors,
            console=console,
            part=Part(
                sharing=Sharing(
                    gradients=ranks.gradients,  # type: ignore[arg-type]  # the interface of `Gradients`
                    mesh_of=ranks.mesh_of,
                    local=ranks.local,
                    sum_over_all=ranks.sum_over_all,
                    sum_over_tokens=ranks.sum,
                ),
                copy=engine_model,
                like=ranks.like,
                placement=placement,
                shard=ranks.apply,
                rank=dist.get_rank(),
                num_ranks=dist.get_world_size(),
                opens_rollouts=self._has_engine,
            ),
        )
        self.gathered: tuple[MiMo, dict[str, torch.Tensor]] | None = None

    def execute(self, order: Order) -> Any:
        """Execute an order. Returns the answer for the leading process."""
        match order:
            case RolloutOrder():
                return self._roll_out(order)
            case WeightsOrder():
                return self._copy_weights(order.version)
            case StepOrder():
                return self._take_step(order)
            case ScoreOrder():
                return self._score(order)
            case CheckOrder():
                return self.learner.trainer.check_weights(order.where)
            case HeldOutOrder():
                return self.learner.roll_out_held_out(order.problems) if order.problems else {}
            case GatherOrder():
                return self._gather(order.with_optimizer)
            case EndOrder():
                raise AssertionError("`follow` ends")

    def close(self) -> None:
        """Stop all samples, and release the engine and services."""
        if self._has_engine:
            self.learner.rollouts.close()
        self.learner.calls.close()
        close_services()

    def _roll_out(self, order: RolloutOrder) -> list[Any]:
        rollouts = self.learner.rollouts
        for call in order.calls:
            if isinstance(call, Cancel):
                rollouts.cancel(list(call.sample_ids))
            else:
                rollouts.submit(call)
        if order.then == "nothing":
            return []
        return list(rollouts.poll() if order.then == "poll" else rollouts.interrupt())

    @torch.no_grad()
    def _copy_weights(self, version: int) -> None:
        """Copy the weights of the trainer to the engine, a few at a time. Captured graphs read the same memory."""
        for bucket in _buckets(self.learner.model):
            if self._has_engine:
                self.learner.engine.update_weights(bucket, version=version, recompute=False)
        if self._has_engine:
            self.learner.rollouts.update_weights(version)

    def _take_step(self, order: StepOrder) -> tuple[StepSums, dict[str, list[float]]]:
        """Returns the sums of this process; on others than the leading one also those of its teachers."""
        learner = self.learner
        sums = learner.trainer.take_step(order.plan, learner.objective())
        if self.ranks.is_main:
            return sums, {}
        sums.load = {}  # those of all processes, which the leading one has
        if learner.distillation is None:
            return sums, {}
        return sums, learner.distillation.take_sums()

    def _score(self, order: ScoreOrder) -> list[list[Any]]:
        return [self._score_packs(teacher, packs) for teacher, packs in order.parts]

    def _score_packs(self, teacher: str | None, packs: list[PackPlan]) -> list[Any]:
        learner = self.learner
        if teacher is None:
            replay = learner.trainer.replay_routing
            return [score_pack(learner.model, pack.samples, replay=replay) for pack in packs]
        assert learner.distillation is not None, "a run with teachers"
        model = learner.distillation.teachers.model(teacher)
        return [score_pack(model, pack.samples, replay=False) for pack in packs]

    def _gather(self, with_optimizer: bool) -> None:
        learner = self.learner
        tensors = optimizer_state(learner.model, learner.trainer.optimizer) if with_optimizer else {}
        self.gathered = self.ranks.gathered(learner.model, tensors)


def follow(member: Member, channel: Channel) -> None:
    """Execute the orders of the leading process until the last one. Signals only end the leading process.

    Raises:
        SystemExit: The run has failed; the leading process prints the error.
    """
    with stop_requests():
        while not isinstance(order := channel.receive(), EndOrder):
            channel.reply(answer(member.execute, order))
    member.close()
    if order.has_failed:
        raise SystemExit(1)


def _buckets(model: MiMo) -> Iterator[dict[str, torch.Tensor]]:
    """The whole tensors of a sharded model by name, gathered one at a time, in parts of at least one tensor."""
    bucket: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in model_tensors(model).items():
        bucket[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        num_bytes += bucket[name].numel() * bucket[name].element_size()
        if num_bytes >= _BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = {}, 0
    if bucket:
        yield bucket
