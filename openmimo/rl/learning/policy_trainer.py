"""The trainer of the policy: log-probabilities of samples, and optimizer steps on them.

The trainer does not know the algorithm. A sample holds the advantage and the share of the loss of each token
(`advantages`, `weights`); an objective computes the loss. Micro-batches are packed from whole samples
(`learning/packing.py`) and routed as the engine routed them (R3, paper section 4.6.1).

T packed tokens, N policy-written tokens of a micro-batch, D model dim, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from openmimo.core.samples import Sample
from openmimo.kernels.operations import token_logprobs
from openmimo.model.backbone import Hidden
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.heads import micro_batch
from openmimo.model.mimo import MiMo
from openmimo.rl.learning.annotation import spread
from openmimo.rl.learning.packing import PackedSamples, divide_into_packs, pack_samples, packs
from openmimo.rl.losses.tokens import TokenBatch, batch_diagnostics
from openmimo.train.config import OptimizerConfig
from openmimo.train.optim import Gradients, StepGuard, build_optimizer, clip_gradients

MAX_NAMED_GROUPS = 8
ENTROPY_ROWS = 128


@dataclass(frozen=True)
class Forward:
    """A micro-batch after the model's forward pass: the input of an objective.

    Attributes:
        pack: The packed samples.
        states_ND: [N, D], the states that predict policy-written tokens, ready for the output head, with gradient.
        batch: Log-probabilities, advantages and ages of the policy-written tokens.
        weights_N: float32 [N], the share of each token in the loss of the step.
        is_filler: See `PackPlan`.
    """

    pack: PackedSamples
    states_ND: torch.Tensor
    batch: TokenBatch
    weights_N: torch.Tensor
    is_filler: bool = False


Objective = Callable[[Forward], torch.Tensor]


@dataclass
class UpdateReport:
    """Results of one optimizer step.

    Attributes:
        loss: The loss, summed over micro-batches, without that of the MTP heads.
        gradient_norm: Before clipping, without the MTP heads.
        num_zero_gradients: Gradient entries that are exactly zero.
        num_tokens: Packed tokens.
        diagnostics: Means over the policy-written tokens of the step.
        load: By layer, the tokens that each expert received.
        gradient_shares: By domain, its share of the summed norms of the loss's gradients with respect to `states_ND`.
    """

    loss: float = 0.0
    gradient_norm: float = 0.0
    num_zero_gradients: int = 0
    num_tokens: int = 0
    diagnostics: dict[str, float] = field(default_factory=dict)
    load: dict[int, torch.Tensor] = field(default_factory=dict)
    gradient_shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PackPlan:
    """The samples of one micro-batch.

    Attributes:
        samples: The samples.
        old_logprobs: log π_old of their tokens (None: π_old is the policy before the step).
        is_filler: The micro-batch is no part of the step: with it, a process without samples takes part in the
            communication of the others. Its samples have no weight.
    """

    samples: list[Sample]
    old_logprobs: list[np.ndarray] | None = None
    is_filler: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of one process.

    Attributes:
        packs: The micro-batches of this process, in order.
        learning_rate: Of this step.
        version: The policy version before this step.
        num_written: Policy-written tokens of the step, of all processes.
        groups: The groups of its samples, of all processes.
        num_samples: Its samples, of all processes.
        gate: Limits "low" and "high" of the correction, for the diagnostics.
    """

    packs: list[PackPlan]
    learning_rate: float
    version: int
    num_written: int
    groups: tuple[str, ...]
    num_samples: int
    gate: Mapping[str, float]


@dataclass
class StepSums:
    """What one process adds to the report of a step. Norm, zeros and load are those of all processes.

    Attributes:
        loss: As in `UpdateReport`, like the attributes that are not listed.
        diagnostics: By name, the value of each micro-batch and its policy-written tokens.
        gradient_norms: By domain, the sum of the norms of the loss's gradients with respect to `states_ND`.
    """

    loss: float = 0.0
    gradient_norm: float = 0.0
    num_zero_gradients: int = 0
    num_tokens: int = 0
    diagnostics: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    load: dict[int, torch.Tensor] = field(default_factory=dict)
    gradient_norms: dict[str, float] = field(default_factory=dict)


def report_of(parts: Sequence[StepSums]) -> UpdateReport:
    """The report of a step, from the sums of each process."""
    diagnostics: dict[str, list[tuple[float, int]]] = {}
    norms: dict[str, float] = {}
    for part in parts:
        for name, pairs in part.diagnostics.items():
            diagnostics.setdefault(name, []).extend(pairs)
        for domain, norm in part.gradient_norms.items():
            norms[domain] = norms.get(domain, 0.0) + norm
    total = sum(norms.values()) or 1.0
    return UpdateReport(
        loss=sum(part.loss for part in parts),
        gradient_norm=parts[0].gradient_norm,
        num_zero_gradients=parts[0].num_zero_gradients,
        num_tokens=sum(part.num_tokens for part in parts),
        diagnostics=_means(diagnostics),
        load=parts[0].load,
        gradient_shares={domain: norm / total for domain, norm in norms.items()},
    )


@dataclass(frozen=True)
class Sharing:
    """How the processes of a run share the policy. The default is one process that holds all of it.

    Attributes:
        gradients: Measures of the gradients.
        mesh_of: Returns the mesh over which a parameter is distributed.
        local: Returns the part of a parameter, gradient or buffer that this process holds.
        sum_over_all: Sums a tensor over all processes.
        sum_over_tokens: Sums a tensor over the processes with different samples.
    """

    gradients: Gradients = field(default_factory=Gradients)
    mesh_of: Callable[[torch.Tensor], object] = lambda parameter: None
    local: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    sum_over_all: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    sum_over_tokens: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


class PolicyTrainer:
    """Trains a policy. The caller owns the model; the trainer owns the optimizer."""

    def __init__(
        self,
        model: MiMo,
        optimizer: OptimizerConfig,
        *,
        tokens_per_microbatch: int = 8192,
        replay_routing: bool = True,
        bias_rate: float = 0.0,
        mtp_weight: float = 0.0,
        sharing: Sharing | None = None,
    ):
        """
        Args:
            model: The policy.
            optimizer: Settings of the optimizer.
            tokens_per_microbatch: Packed tokens of a forward pass; one sample may have more.
            replay_routing: Route tokens as the samples say.
            bias_rate: Step size of the experts' selection bias.
            mtp_weight: Weight of the MTP heads' own loss on policy-written tokens. It trains the heads alone, so that
                their drafts follow the policy.
            sharing: How the processes of the run share the model (None: one process).
        """
        self.model = model.train()
        self.config = optimizer
        self.sharing = sharing or Sharing()
        self.optimizer = build_optimizer(model, optimizer, mesh_of=self.sharing.mesh_of)
        self.tokens_per_microbatch = tokens_per_microbatch
        self.replay_routing = replay_routing
        self.bias_rate = bias_rate
        self.mtp_weight = mtp_weight
        mtp = model.model.mtp
        assert isinstance(mtp, nn.Module)
        self._heads = list(mtp.parameters())
        self.guard = StepGuard(
            model,
            max_skipped_steps=optimizer.max_skipped_steps,
            reduce=self.sharing.sum_over_all,
            local=self.sharing.local,
        )
        self._probe: list[Sample] = []  # one sample of the newest step that was taken

    @property
    def trains_heads(self) -> bool:
        """Whether updates train MTP heads. Their labels cross the end of the prompt, so prompts are then not shared."""
        return bool(self.mtp_weight and self.model.config.num_mtp_heads)

    @torch.no_grad()
    def logprobs(self, samples: list[Sample]) -> list[np.ndarray]:
        """log π of the tokens of each sample at its temperature, float64 [T]; 0.0 outside the loss mask."""
        return score_samples(
            self.model, samples, tokens_per_microbatch=self.tokens_per_microbatch, replay=self.replay_routing
        )

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
        """Take one optimizer step on annotated samples.

        Args:
            samples: Samples with advantages and weights.
            objective: Computes the loss of a micro-batch.
            learning_rate: Of this step.
            version: The policy version before this step.
            old_logprobs: log π_old of each sample's tokens, where an earlier update has changed the policy since (None:
                π_old is the policy before this step).
            pack_key: Samples with different keys are never in one micro-batch.
            gate: Limits "low" and "high" of the correction, for the diagnostics.

        Raises:
            DivergedError: See `StepGuard.allows_step`.
        """
        plan = step_plan(
            samples,
            self.tokens_per_microbatch,
            learning_rate=learning_rate,
            version=version,
            old_logprobs=old_logprobs,
            pack_key=pack_key,
            gate=gate or {},
            share_prompts=not self.trains_heads,
        )
        return report_of([self.take_step(plan, objective)])

    def take_step(self, plan: StepPlan, objective: Objective) -> StepSums:
        """Take one optimizer step on the micro-batches of this process. All processes call it together.

        Raises:
            DivergedError: See `StepGuard.allows_step`.
        """
        sums = StepSums()
        losses = [torch.zeros((), device=self.model.device)]
        for pack_plan in plan.packs:
            pack_sums = StepSums()
            losses += self._add_gradients(pack_plan, plan, objective, pack_sums)
            if not pack_plan.is_filler:
                _add(sums, pack_sums)
        moe = self.model.config.moe
        if moe is not None and plan.packs:
            none = torch.zeros(moe.num_experts, dtype=torch.int64, device=self.model.device)
            layers = self.model.routers()
            sums.load = {layer: self.sharing.sum_over_tokens(sums.load.get(layer, none)) for layer in layers}
        self._step(sums, plan, losses)
        return sums

    def _add_gradients(
        self, pack_plan: PackPlan, plan: StepPlan, objective: Objective, sums: StepSums
    ) -> list[torch.Tensor]:
        """Accumulate the gradients of a micro-batch, and its sums. Returns its losses."""
        pack = pack_samples(pack_plan.samples, device=self.model.device, share_prompts=not self.trains_heads)
        context, hidden = self._forward(pack)
        forward = self._tokens(pack, hidden, plan.version, pack_plan)
        forward.states_ND.register_hook(functools.partial(_add_norms, sums.gradient_norms, pack))
        loss = objective(forward)
        loss.backward()
        losses = [loss.detach()]
        if self.trains_heads:
            heads_loss = self.mtp_weight * self._heads_loss(pack, hidden, context, plan.num_written)
            (0.0 * heads_loss if pack_plan.is_filler else heads_loss).backward()
            losses.append(heads_loss.detach())
        sums.loss = float(loss.detach())
        sums.num_tokens = len(pack.tokens_T)
        if self.model.config.moe is not None:
            context.routing.add_expert_load(sums.load, self.model.config.moe.num_experts)
        for name, value in self._diagnostics(forward, plan.gate).items():
            sums.diagnostics[name] = [(value, len(pack.labels_N))]
        return losses

    def _step(self, sums: StepSums, plan: StepPlan, losses: list[torch.Tensor]) -> None:
        """Clip the gradients and take the optimizer step, if the guard allows it. Clears the gradients."""
        gradients = clip_gradients(
            self.model, self.config.clip_norm, apart=self._heads, gradients=self.sharing.gradients
        )
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = plan.learning_rate
        groups = ", ".join(plan.groups[:MAX_NAMED_GROUPS])
        where = f"step {plan.version + 1} ({plan.num_samples} samples of the groups {groups})"
        if self.guard.allows_step(torch.stack(losses), gradients, where, has_data=plan.num_samples > 0):
            self.optimizer.step()
            for layer, router in self.model.routers().items():
                if self.bias_rate and layer in sums.load:
                    router.update_selection_bias(sums.load[layer], self.bias_rate)
            self._probe = plan.packs[0].samples[:1] if plan.packs else []
        self.optimizer.zero_grad(set_to_none=True)
        sums.gradient_norm, sums.num_zero_gradients = float(gradients.norm), int(gradients.num_zeros)

    def check_weights(self, where: str) -> None:
        """Check that the weights are finite, and that a sample of the newest step still has a finite loss.

        Args:
            where: The moment, for the message.

        Raises:
            DivergedError: They are not.
        """
        self.guard.check_weights(f"the policy {where}")
        for pack in packs(self._probe, self.tokens_per_microbatch, device=self.model.device):
            _, hidden = self._forward(pack)
            loss = -_logprobs(self.model, hidden.post_norm_TD[pack.rows_N], pack).mean()
            self.guard.check_step(loss, f"the policy {where}, on a sample of the newest step,")

    def _forward(self, pack: PackedSamples) -> tuple[PackedContext, Hidden]:
        routing = RoutingTape(record=True, replayed=pack.routes(self.model) if self.replay_routing else {})
        context = pack.context(routing)
        return context, self.model(pack.tokens_T, context)

    def _tokens(self, pack: PackedSamples, hidden: Hidden, version: int, plan: PackPlan) -> Forward:
        states_ND = hidden.post_norm_TD[pack.rows_N]
        logprobs_N = _logprobs(self.model, states_ND, pack)
        versions_N = pack.written(lambda sample: sample.versions, dtype=torch.int64)
        old_of = dict(zip(map(id, plan.samples), plan.old_logprobs or [], strict=plan.old_logprobs is not None))
        old_N = pack.written(lambda sample: old_of[id(sample)]) if old_of else logprobs_N.detach()
        batch = TokenBatch(
            logprobs_N=logprobs_N,
            old_logprobs_N=old_N,
            behavior_logprobs_N=pack.written(lambda sample: sample.logprobs),
            advantages_N=pack.written(lambda sample: sample.advantages),
            sequence_N=pack.sequence_N,
            staleness_N=(version - versions_N).clamp(min=0),
            num_sequences=len(pack.samples),
        )
        return Forward(pack, states_ND, batch, pack.written(lambda sample: sample.weights), plan.is_filler)

    def _diagnostics(self, forward: Forward, gate: Mapping[str, float]) -> dict[str, float]:
        entropies = _entropies(self.model, forward.states_ND, forward.pack.temperature_N)
        return batch_diagnostics(forward.batch, low=gate.get("low"), high=gate.get("high"), entropy_N=entropies)

    def _heads_loss(
        self, pack: PackedSamples, hidden: Hidden, context: PackedContext, num_written: int
    ) -> torch.Tensor:
        """Cross-entropy of the MTP heads on policy-written tokens. Its gradient reaches the heads only.

        Embeddings, states of the main model and the weight of the output head are constants here.
        """
        model, mtp = self.model, self.model.config.mtp
        assert mtp is not None, "the model has MTP heads"
        mask_T = torch.zeros(len(pack.tokens_T), dtype=torch.bool, device=model.device)
        mask_T[pack.rows_N + 1] = True
        batch = micro_batch(pack.tokens_T, pack.lengths, mask_T, model.config.num_mtp_heads)
        hidden_TD = (hidden.pre_norm_TD if mtp.hidden == "pre_norm" else hidden.post_norm_TD).detach()
        losses = []
        for head, (shifted_T, labels_T) in enumerate(zip(batch.shifted, batch.labels[1:], strict=True)):
            with torch.no_grad():
                embedding_TD = model.model.embed_tokens(shifted_T, model.compute_dtype)
            states_TD = model.model.mtp(head, embedding_TD, hidden_TD, context)
            logprobs_T = model.head(states_TD, functools.partial(_with_constant_head, labels_T=labels_T))
            losses.append(-logprobs_T.sum() / max(num_written, 1))
        return torch.stack(losses).mean()


def _with_constant_head(states_TD: torch.Tensor, weight_VD: torch.Tensor, *, labels_T: torch.Tensor) -> torch.Tensor:
    return token_logprobs(states_TD, weight_VD.detach(), labels_T)


def step_plan(
    samples: list[Sample],
    tokens_per_pack: int,
    *,
    learning_rate: float,
    version: int,
    old_logprobs: Sequence[np.ndarray] | None,
    pack_key: Callable[[Sample], str],
    gate: Mapping[str, float],
    share_prompts: bool,
) -> StepPlan:
    """Divide the samples of a step that have any weight into micro-batches. Arguments as in `PolicyTrainer.update`."""
    learned = sorted((sample for sample in samples if sample.weights.any()), key=pack_key)
    old = {id(sample): logprobs for sample, logprobs in zip(samples, old_logprobs or [], strict=bool(old_logprobs))}
    members = divide_into_packs(learned, tokens_per_pack, key=pack_key, share_prompts=share_prompts)
    return StepPlan(
        packs=[PackPlan(own, [old[id(sample)] for sample in own] if old else None) for own in members],
        learning_rate=learning_rate,
        version=version,
        num_written=sum(sample.num_answer_tokens for sample in learned),
        groups=tuple(dict.fromkeys(sample.group for sample in learned)),
        num_samples=len(learned),
        gate=gate,
    )


def weighted_sum(token_losses: Callable[[TokenBatch], torch.Tensor]) -> Objective:
    """The objective of an algorithm with a loss per token: the sum of token losses times weights."""
    return lambda forward: (token_losses(forward.batch) * forward.weights_N).sum()


@torch.no_grad()
def score_samples(
    model: MiMo, samples: list[Sample], *, tokens_per_microbatch: int = 8192, replay: bool = True
) -> list[np.ndarray]:
    """Log-probabilities of the tokens of each sample under `model`, float64 [T]; 0.0 outside the loss mask.

    Args:
        model: The model that scores.
        samples: The samples, each at its temperature.
        tokens_per_microbatch: Packed tokens of a forward pass; one sample may have more.
        replay: Route tokens as the samples say.
    """
    members = divide_into_packs(samples, tokens_per_microbatch, share_prompts=True)
    return [scores for own in members for scores in score_pack(model, own, replay=replay)]


@torch.no_grad()
def score_pack(model: MiMo, samples: list[Sample], *, replay: bool) -> list[np.ndarray]:
    """The result of `score_samples` for the samples of one forward pass."""
    pack = pack_samples(samples, device=model.device, share_prompts=True)
    hidden = model(pack.tokens_T, pack.context(RoutingTape(replayed=pack.routes(model) if replay else {})))
    logprobs_N = _logprobs(model, hidden.post_norm_TD[pack.rows_N], pack).cpu()
    counts = [sample.num_answer_tokens for sample in pack.samples]
    return list(map(spread, pack.samples, logprobs_N.split(counts)))


def _logprobs(model: MiMo, states_ND: torch.Tensor, pack: PackedSamples) -> torch.Tensor:
    return model.head.logprobs(states_ND, pack.labels_N, pack.temperature_N)


@torch.no_grad()
def _entropies(model: MiMo, states_ND: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """The policy's entropy in nats at no more than ENTROPY_ROWS evenly spaced rows, as each needs the output head."""
    rows = torch.arange(0, len(states_ND), -(-len(states_ND) // ENTROPY_ROWS), device=states_ND.device)
    logprobs_RV = (model.head(states_ND[rows]) / temperature_N[rows, None]).log_softmax(dim=-1)
    return -(logprobs_RV.exp() * logprobs_RV).sum(dim=-1)


def _add_norms(by_domain: dict[str, float], pack: PackedSamples, gradient_ND: torch.Tensor) -> None:
    """Add the norm of each row of a gradient to the domain of its sample."""
    norms_B = torch.zeros(len(pack.samples), device=gradient_ND.device)
    norms_B.index_add_(0, pack.sequence_N, gradient_ND.detach().float().norm(dim=-1))
    for sample, norm in zip(pack.samples, norms_B.tolist(), strict=True):
        by_domain[sample.domain] = by_domain.get(sample.domain, 0.0) + norm


def _add(total: StepSums, part: StepSums) -> None:
    """Add the sums of a micro-batch."""
    total.loss += part.loss
    total.num_tokens += part.num_tokens
    for name, pairs in part.diagnostics.items():
        total.diagnostics.setdefault(name, []).extend(pairs)
    for layer, load_E in part.load.items():
        total.load[layer] = total.load[layer] + load_E if layer in total.load else load_E
    for domain, norm in part.gradient_norms.items():
        total.gradient_norms[domain] = total.gradient_norms.get(domain, 0.0) + norm


def _means(sums: dict[str, list[tuple[float, int]]]) -> dict[str, float]:
    """Means over micro-batches, weighted by their tokens; the maximum of maxima."""
    means = {}
    for name, pairs in sums.items():
        if "max" in name:
            means[name] = max(value for value, _ in pairs)
        else:
            means[name] = sum(value * count for value, count in pairs) / max(1, sum(count for _, count in pairs))
    return means
