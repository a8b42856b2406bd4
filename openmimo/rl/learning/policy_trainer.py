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
from openmimo.model.backbone import Hidden
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.heads import micro_batch
from openmimo.model.mimo import MiMo
from openmimo.rl.learning.annotation import spread
from openmimo.rl.learning.packing import PackedSamples, packs
from openmimo.rl.losses.tokens import TokenBatch, batch_diagnostics
from openmimo.train.config import OptimizerConfig
from openmimo.train.optim import StepGuard, build_optimizer, clip_gradients

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
    """

    pack: PackedSamples
    states_ND: torch.Tensor
    batch: TokenBatch
    weights_N: torch.Tensor


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
        """
        self.model = model.train()
        self.config = optimizer
        self.optimizer = build_optimizer(model, optimizer)
        self.tokens_per_microbatch = tokens_per_microbatch
        self.replay_routing = replay_routing
        self.bias_rate = bias_rate
        self.mtp_weight = mtp_weight
        mtp = model.model.mtp
        assert isinstance(mtp, nn.Module)
        self._heads = list(mtp.parameters())
        self.guard = StepGuard(model, max_skipped_steps=optimizer.max_skipped_steps)
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
        report = UpdateReport()
        sums: dict[str, list[tuple[float, int]]] = {}
        losses = [torch.zeros((), device=self.model.device)]
        learned = sorted((sample for sample in samples if sample.weights.any()), key=pack_key)
        old = {id(sample): logprobs for sample, logprobs in zip(samples, old_logprobs or [], strict=bool(old_logprobs))}
        num_written = sum(sample.num_answer_tokens for sample in learned)
        for pack in packs(
            learned,
            self.tokens_per_microbatch,
            device=self.model.device,
            key=pack_key,
            share_prompts=not self.trains_heads,
        ):
            context, hidden = self._forward(pack)
            forward = self._tokens(pack, hidden, version, old)
            forward.states_ND.register_hook(functools.partial(_add_norms, report.gradient_shares, pack))
            loss = objective(forward)
            loss.backward()
            if self.trains_heads:
                heads_loss = self.mtp_weight * self._heads_loss(pack, hidden, context, num_written)
                heads_loss.backward(inputs=self._heads)  # not the embedding, which the heads read too
                losses.append(heads_loss.detach())
            losses.append(loss.detach())
            report.loss += float(loss.detach())
            report.num_tokens += len(pack.tokens_T)
            if self.model.config.moe is not None:
                context.routing.add_expert_load(report.load, self.model.config.moe.num_experts)
            _add_means(sums, self._diagnostics(forward, gate or {}), len(pack.labels_N))
        self._step(report, learned, losses, learning_rate, version)
        report.diagnostics = _means(sums)
        total = sum(report.gradient_shares.values())
        report.gradient_shares = {domain: norm / (total or 1.0) for domain, norm in report.gradient_shares.items()}
        return report

    def _step(
        self,
        report: UpdateReport,
        learned: list[Sample],
        losses: list[torch.Tensor],
        learning_rate: float,
        version: int,
    ) -> None:
        """Clip the gradients and take the optimizer step, if the guard allows it. Clears the gradients."""
        gradients = clip_gradients(self.model, self.config.clip_norm, apart=self._heads)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = learning_rate
        groups = list(dict.fromkeys(sample.group for sample in learned))
        where = f"step {version + 1} ({len(learned)} samples of the groups {', '.join(groups[:MAX_NAMED_GROUPS])})"
        if self.guard.allows_step(torch.stack(losses), gradients, where, has_data=bool(learned)):
            self.optimizer.step()
            for layer, router in self.model.routers().items():
                if self.bias_rate and layer in report.load:
                    router.update_selection_bias(report.load[layer], self.bias_rate)
            self._probe = learned[:1]
        self.optimizer.zero_grad(set_to_none=True)
        report.gradient_norm, report.num_zero_gradients = float(gradients.norm), int(gradients.num_zeros)

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

    def _tokens(self, pack: PackedSamples, hidden: Hidden, version: int, old: dict[int, np.ndarray]) -> Forward:
        states_ND = hidden.post_norm_TD[pack.rows_N]
        logprobs_N = _logprobs(self.model, states_ND, pack)
        versions_N = pack.written(lambda sample: sample.versions, dtype=torch.int64)
        old_N = pack.written(lambda sample: old[id(sample)]) if old else logprobs_N.detach()
        batch = TokenBatch(
            logprobs_N=logprobs_N,
            old_logprobs_N=old_N,
            behavior_logprobs_N=pack.written(lambda sample: sample.logprobs),
            advantages_N=pack.written(lambda sample: sample.advantages),
            sequence_N=pack.sequence_N,
            staleness_N=(version - versions_N).clamp(min=0),
            num_sequences=len(pack.samples),
        )
        return Forward(pack, states_ND, batch, pack.written(lambda sample: sample.weights))

    def _diagnostics(self, forward: Forward, gate: Mapping[str, float]) -> dict[str, float]:
        entropies = _entropies(self.model, forward.states_ND, forward.pack.temperature_N)
        return batch_diagnostics(forward.batch, low=gate.get("low"), high=gate.get("high"), entropy_N=entropies)

    def _heads_loss(
        self, pack: PackedSamples, hidden: Hidden, context: PackedContext, num_written: int
    ) -> torch.Tensor:
        """Cross-entropy of the MTP heads on policy-written tokens, detached from the backbone and the output head."""
        mask_T = torch.zeros(len(pack.tokens_T), dtype=torch.bool, device=self.model.device)
        mask_T[pack.rows_N + 1] = True
        heads = self.model.config.num_mtp_heads
        batch = micro_batch(pack.tokens_T, pack.lengths, mask_T, heads)
        backbone = Hidden(hidden.pre_norm_TD.detach(), hidden.post_norm_TD.detach())
        states = self.model(None, context, dict(enumerate(batch.shifted)), hidden=backbone).mtp_TD
        losses = []
        for states_TD, labels_T in zip(states.values(), batch.labels[1:], strict=True):
            losses.append(-self.model.head.logprobs(states_TD, labels_T).sum() / max(num_written, 1))
        return torch.stack(losses).mean()


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
    scores: list[np.ndarray] = []
    for pack in packs(samples, tokens_per_microbatch, device=model.device, share_prompts=True):
        hidden = model(pack.tokens_T, pack.context(RoutingTape(replayed=pack.routes(model) if replay else {})))
        logprobs_N = _logprobs(model, hidden.post_norm_TD[pack.rows_N], pack).cpu()
        counts = [sample.num_answer_tokens for sample in pack.samples]
        scores += map(spread, pack.samples, logprobs_N.split(counts))
    return scores


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


def _add_means(sums: dict[str, list[tuple[float, int]]], values: dict[str, float], count: int) -> None:
    for name, value in values.items():
        sums.setdefault(name, []).append((value, count))


def _means(sums: dict[str, list[tuple[float, int]]]) -> dict[str, float]:
    """Means over micro-batches, weighted by their tokens; the maximum of maxima."""
    means = {}
    for name, pairs in sums.items():
        if "max" in name:
            means[name] = max(value for value, _ in pairs)
        else:
            means[name] = sum(value * count for value, count in pairs) / max(1, sum(count for _, count in pairs))
    return means
