"""The leading process of a run on several devices: its learner lets all processes roll out, score and learn.

The loop, the scheduler, the event log, metrics and checkpoints run in this process only, as in a run on one device.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from openmimo.core.samples import Sample
from openmimo.model.mimo import MiMo
from openmimo.rl.evaluate import HeldOut
from openmimo.rl.learning.packing import divide_into_packs
from openmimo.rl.learning.policy_trainer import Objective, PackPlan, UpdateReport, report_of, step_plan
from openmimo.rl.ranks.division import divided, joined
from openmimo.rl.ranks.member import Member
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
from openmimo.rl.rollouts.protocol import Rollouts
from openmimo.rl.rollouts.worker import Cancel
from openmimo.rl.scheduling.groups import GroupRequest, LateReward
from openmimo.rl.teaching.teachers import Distillation
from openmimo.train.optim import StepGuard


class Crew:
    """All processes of the run, as the leading one sees them.

    Attributes:
        member: The part of this process.
        count: The number of processes.
        row_ranks: By process, its number among those that learn from different samples.
    """

    def __init__(self, member: Member, channel: Channel, row_ranks: list[int]):
        self.member, self.count, self.row_ranks = member, channel.count, row_ranks
        self._channel = channel
        self._is_between_orders = True

    @property
    def distillation(self) -> Distillation:
        """The teachers of this process, in a run with teachers."""
        assert self.member.learner.distillation is not None
        return self.member.learner.distillation

    @property
    def num_row_ranks(self) -> int:
        """The number of processes that learn from different samples."""
        return max(self.row_ranks) + 1

    def execute(self, orders: Sequence[Order]) -> list[Any]:
        """Let each process execute its order. Returns their answers.

        Raises:
            UserError: A process has failed.
        """
        self._is_between_orders = False
        self._channel.scatter(orders)
        own = answer(self.member.execute, orders[0])
        answers = [own, *self._channel.gather()]
        self._is_between_orders = True
        for one in answers:
            if one.error is not None:
                raise one.error
        return [one.value for one in answers]

    def by_rows(self, parts: Sequence[Order]) -> list[Any]:
        """Let the processes that learn from the samples of part i execute order i. Returns one answer for each part."""
        answers = self.execute([parts[number] for number in self.row_ranks])
        return [answers[self.row_ranks.index(number)] for number in range(len(parts))]

    def end(self, *, has_failed: bool) -> None:
        """End the other processes. Those that wait for the end of an order notice the end of this process."""
        if self._is_between_orders:
            self._channel.scatter([EndOrder(has_failed)] * self.count)


class CrewTrainer:
    """The trainer of all processes, with the interface of `PolicyTrainer`."""

    def __init__(self, crew: Crew):
        self._crew, self._own = crew, crew.member.learner.trainer

    @property
    def guard(self) -> StepGuard:
        """The guard, whose decisions are those of all processes."""
        return self._own.guard

    @property
    def trains_heads(self) -> bool:
        """See `PolicyTrainer`."""
        return self._own.trains_heads

    def logprobs(self, samples: list[Sample]) -> list[np.ndarray]:
        """See `PolicyTrainer`."""
        return self.score(samples, teacher=None)

    def score(self, samples: list[Sample], *, teacher: str | None) -> list[np.ndarray]:
        """Log-probabilities of the tokens of each sample by the policy, or by the teacher of a domain."""
        packs = self._packs(samples)
        parts = divided(packs, self._crew.num_row_ranks, key=lambda sample: "")
        answers = self._crew.by_rows([ScoreOrder([(teacher, part)]) for part in parts])
        results = joined(packs, parts, [own for (own,) in answers])
        return [scores for own in results for scores in own]

    def score_by_owners(self, samples: Mapping[str, list[Sample]]) -> dict[str, list[np.ndarray]]:
        """By domain, the log-probabilities by its teacher. Each process scores for the teachers that it has."""
        teachers = self._crew.distillation.teachers
        orders = [
            ScoreOrder(
                [(domain, self._packs(own)) for domain, own in samples.items() if teachers.owner(domain) == rank]
            )
            for rank in range(self._crew.count)
        ]
        found: dict[str, list[np.ndarray]] = {}
        for order, answers in zip(orders, self._crew.execute(orders), strict=True):
            for (domain, _), results in zip(order.parts, answers, strict=True):
                assert domain is not None, "a teacher's"
                found[domain] = [scores for own in results for scores in own]
        return found

    def _packs(self, samples: list[Sample]) -> list[PackPlan]:
        members = divide_into_packs(samples, self._own.tokens_per_microbatch, share_prompts=True)
        return [PackPlan(own) for own in members]

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
        """See `PolicyTrainer`. Each process has the objective of the config."""
        plan = step_plan(
            samples,
            self._own.tokens_per_microbatch,
            learning_rate=learning_rate,
            version=version,
            old_logprobs=old_logprobs,
            pack_key=pack_key,
            gate=gate or {},
            share_prompts=not self._own.trains_heads,
        )
        parts = divided(plan.packs, self._crew.num_row_ranks, key=pack_key)
        answers = self._crew.by_rows([StepOrder(replace(plan, packs=part)) for part in parts])
        sums = []
        for step_sums, teacher_sums in answers:
            sums.append(step_sums)
            if teacher_sums:
                self._crew.distillation.add_sums(teacher_sums)
        return report_of(sums)

    def check_weights(self, where: str) -> None:
        """See `PolicyTrainer`."""
        self._crew.execute([CheckOrder(where)] * self._crew.count)


class CrewRollouts:
    """Rollouts by the engines of all processes, in lockstep: each poll is one step of every engine.

    A request goes to the process with the fewest running samples. Tokens depend on the sample and the weights only, and
    results are returned in the order of submission, so that they do not depend on the number of processes as long as a
    step of one engine has room for the same samples as a step of several.
    """

    runs_while_learning = False

    def __init__(self, crew: Crew):
        self._crew, self._own = crew, crew.member.learner.rollouts
        self._calls: list[list[GroupRequest | Cancel]] = [[] for _ in range(crew.count)]
        self._running: dict[str, tuple[int, int]] = {}  # by sample id: the process, and the number of the submission
        self._unscored: dict[str, tuple[int, int]] = {}
        self._num_submitted = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_unscored(self) -> int:
        return len(self._unscored)

    @property
    def repeats_exactly(self) -> bool:
        return self._own.repeats_exactly

    def submit(self, request: GroupRequest) -> None:
        loads = Counter(rank for rank, _ in self._running.values())
        rank = min(range(self._crew.count), key=lambda rank: loads[rank])
        for sample_id in request.sample_ids:
            self._running[sample_id] = (rank, self._num_submitted)
            self._num_submitted += 1
        self._calls[rank].append(request)

    def poll(self) -> list[Sample | LateReward]:
        """Take one step of each engine."""
        return [item for item in self._execute("poll") if self._is_wanted(item)]

    def interrupt(self) -> list[Sample]:
        items = [item for item in self._execute("interrupt") if isinstance(item, Sample)]
        return [item for item in items if self._running.pop(item.info["sample_id"], None) is not None]

    def cancel(self, sample_ids: list[str]) -> None:
        for sample_id in sample_ids:
            assigned = self._running.pop(sample_id, None) or self._unscored.pop(sample_id, None)
            if assigned is not None:
                self._calls[assigned[0]].append(Cancel((sample_id,)))

    def update_weights(self, version: int) -> None:
        """Copy the weights of the trainer to the engines."""
        self._execute("nothing")
        self._crew.execute([WeightsOrder(version)] * self._crew.count)

    def metrics(self) -> dict[str, float]:
        """The engines of the processes have no metrics of their own."""
        return {}

    def close(self) -> None:
        """Close the rollouts of this process. Each other process closes its own when it ends."""
        self._own.close()

    def _execute(self, then: Literal["poll", "interrupt", "nothing"]) -> list[Sample | LateReward]:
        """Send the calls since the last order. Returns the results in the order in which one engine returns them."""
        orders = [RolloutOrder(tuple(calls), then) for calls in self._calls]
        self._calls = [[] for _ in range(self._crew.count)]
        results = self._crew.execute(orders)
        return sorted((item for items in results for item in items), key=self._place)

    def _place(self, item: Sample | LateReward) -> tuple[bool, int]:
        """Late rewards first, then samples by their submission."""
        if isinstance(item, LateReward):
            return False, self._unscored.get(item.sample_id, (0, -1))[1]
        return True, self._running.get(item.info["sample_id"], (0, -1))[1]

    def _is_wanted(self, item: Sample | LateReward) -> bool:
        """Whether an item was not cancelled. A sample without its reward becomes unscored."""
        if isinstance(item, LateReward):
            return self._unscored.pop(item.sample_id, None) is not None
        assigned = self._running.pop(item.info["sample_id"], None)
        if assigned is not None and math.isnan(item.reward) and item.finish_reason not in ("error", "too_long"):
            self._unscored[item.info["sample_id"]] = assigned
        return assigned is not None


class Lead:
    """The learner of a run on several devices; see `rl.learner.Learner`."""

    def __init__(self, crew: Crew):
        own = crew.member.learner
        self._crew = crew
        self.trainer = CrewTrainer(crew)
        self.engine, self.calls, self.distillation = own.engine, own.calls, own.distillation
        self._by_engines = own.config.rollouts == "engine"
        self.rollouts: Rollouts = CrewRollouts(crew) if self._by_engines else own.rollouts
        if self.distillation is not None:
            self.distillation.score = self._score_by_teachers

    def objective(self) -> Objective:
        """See `Learner`."""
        return self._crew.member.learner.objective()

    def update_weights(self, version: int) -> None:
        """See `Learner`. Workers get the copy of this process."""
        if self._by_engines:
            self.rollouts.update_weights(version)
        else:
            self._crew.execute([WeightsOrder(version)] * self._crew.count)

    def roll_out_held_out(self) -> HeldOut:
        """See `Learner`. Each process with an engine takes its share of the problems."""
        config = self._crew.member.learner.config
        count = self._crew.count if self._by_engines else 1
        shares = [tuple(range(config.evaluation.problems))[rank::count] for rank in range(count)]
        shares += [()] * (self._crew.count - count)
        samples: HeldOut = {source.name: {} for source in config.sources}
        for own in self._crew.execute([HeldOutOrder(share) for share in shares]):
            for name, by_index in own.items():
                samples[name] |= by_index
        return samples

    def saved(self, *, with_optimizer: bool = True) -> tuple[MiMo, dict[str, torch.Tensor]]:
        """See `Learner`. The copy in memory is released by the next call."""
        self._crew.member.gathered = None
        self._crew.execute([GatherOrder(with_optimizer)] * self._crew.count)
        gathered, self._crew.member.gathered = self._crew.member.gathered, None
        assert gathered is not None, "this is the leading process"
        return gathered

    def _score_by_teachers(self, samples: list[Sample]) -> None:
        """Set `teacher_logprobs`; see `Teachers.score`."""
        by_domain: dict[str, list[Sample]] = {}
        for sample in samples:
            by_domain.setdefault(sample.domain, []).append(sample)
        if self._crew.distillation.placement == "spread":
            found = self.trainer.score_by_owners(by_domain)
        else:
            found = {domain: self.trainer.score(own, teacher=domain) for domain, own in by_domain.items()}
        for domain, own in by_domain.items():
            for sample, scores in zip(own, found[domain], strict=True):
                sample.teacher_logprobs = scores
