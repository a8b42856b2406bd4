"""The policy's side of post-training: log-probabilities of samples, and optimizer steps on them.

The trainer is blind to algorithms. A sample says by token how much better than expected it was (`advantages`) and what
share of the loss it has (`weights`); an objective says what the loss of a token is. Samples are packed into
micro-batches, whole, and routed as the engine routed them (R3, paper section 4.6.1).

T packed tokens, N policy-written tokens of a micro-batch, D model dim, V vocabulary, A experts a token.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from openmimo.core.samples import Sample
from openmimo.model.backbone import Hidden
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.mimo import MiMo
from openmimo.rl.learning.annotation import spread
from openmimo.rl.learning.shared_prompt import PromptGroup, SharedPromptContext
from openmimo.rl.losses.diagnostics import batch_diagnostics
from openmimo.rl.losses.tokens import TokenBatch
from openmimo.train.config import OptimizerConfig
from openmimo.train.expert_load import add_expert_load
from openmimo.train.guard import StepGuard
from openmimo.train.loss import micro_batch, shifted_tokens
from openmimo.train.optim import build_optimizer, clip_gradients

NOT_RECORDED = -1
_MAX_NAMED = 8  # groups in a message
ENTROPY_ROWS = 128  # of a micro-batch: the output head is computed once more for them


@dataclass(frozen=True)
class PackedSamples:
    """Whole samples, one after another, and where their policy-written tokens are.

    samples: which. tokens_T: the pack. groups: how it is made up; source_T: which token of the samples, one after
    another, each is. rows_N: the row that predicts each written token. labels_N: that token. sequence_N: its sample's
    number in the pack. temperature_N: at which it was sampled.
    """

    samples: list[Sample]
    tokens_T: torch.Tensor
    groups: tuple[PromptGroup, ...]
    source_T: torch.Tensor
    rows_N: torch.Tensor
    labels_N: torch.Tensor
    sequence_N: torch.Tensor
    temperature_N: torch.Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each piece of the pack: of each sample, where no prompt is shared."""
        return tuple(length for group in self.groups for length in (group.prompt, *group.answers))

    def context(self, routing: RoutingTape | None = None) -> PackedContext:
        """What the model needs beside the tokens."""
        if any(group.answers for group in self.groups):
            return SharedPromptContext(self.groups, device=self.tokens_T.device, routing=routing)
        return PackedContext(self.lengths, device=self.tokens_T.device, routing=routing)

    def routes(self, model: MiMo) -> dict[int, torch.Tensor]:
        """Recorded routes by layer, int16 [T, A]; see `replayed_routes`."""
        return replayed_routes(model, self.samples, source_T=self.source_T)

    def written(self, values: Callable[[Sample], np.ndarray], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The entries of the written tokens in a per-token array of each sample, [N]."""
        kept = np.concatenate([np.asarray(values(sample))[sample.loss_mask] for sample in self.samples])
        return torch.from_numpy(kept).to(self.tokens_T.device, dtype)


@dataclass(frozen=True)
class Forward:
    """A micro-batch after the model's forward pass: what an objective may use.

    states_ND: the rows that predict written tokens, ready for the output head, with gradient. batch: their numbers.
    weights_N: their shares of the step's loss.
    """

    pack: PackedSamples
    states_ND: torch.Tensor
    batch: TokenBatch
    weights_N: torch.Tensor


Objective = Callable[[Forward], torch.Tensor]


@dataclass
class UpdateReport:
    """What an optimizer step saw. diagnostics: means over the step's written tokens.

    gradient_shares: by domain, its part of the sum over written tokens of the length of the loss's gradient by the
    state that the output head reads.
    """

    loss: float = 0.0
    gradient_norm: float = 0.0
    num_zero_gradients: int = 0
    num_tokens: int = 0
    diagnostics: dict[str, float] = field(default_factory=dict)
    load: dict[int, torch.Tensor] = field(default_factory=dict)
    gradient_shares: dict[str, float] = field(default_factory=dict)


class PolicyTrainer:
    """Holds the optimizer of a policy, whose weights stay the caller's.

    tokens_per_microbatch: packed tokens in memory at once (one sample, at least). replay_routing: route as the samples
    say. bias_rate: step of the experts' selection bias. mtp_weight: weight of the MTP heads' own loss on what the
    policy wrote, which moves nothing but the heads, so that they keep up with the policy they draft for.
    """

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
        self.model = model.train()
        self.config = optimizer
        self.optimizer = build_optimizer(model, optimizer)
        self.tokens_per_microbatch = tokens_per_microbatch
        self.replay_routing = replay_routing
        self.bias_rate = bias_rate
        self.mtp_weight = mtp_weight
        self._heads = list(model.model.mtp.parameters())
        self.guard = StepGuard(model, max_skipped_steps=optimizer.max_skipped_steps)
        self._probe: list[Sample] = []  # of the newest step that was taken

    @torch.no_grad()
    def logprobs(self, samples: list[Sample]) -> list[np.ndarray]:
        """log π of the tokens of each sample at its temperature, float64 [T]; 0.0 outside the mask."""
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
        old_logprobs: Sequence[Sequence[float]] | None = None,
        pack_key: Callable[[Sample], str] = lambda sample: "",
        gate: Mapping[str, float] | None = None,
    ) -> UpdateReport:
        """One optimizer step on annotated samples. Raises DivergedError; see `StepGuard`.

        version: of the weights now. old_logprobs: log π_old, if these samples have been stepped on already (None: π_old
        is the policy as it stands). pack_key: samples with different keys are never packed together.
        gate: "low" and "high" of the correction, to report what is outside.
        """
        gate = gate or {}
        report, sums = UpdateReport(), {}
        losses = [torch.zeros((), device=self.model.device)]
        learned = sorted((sample for sample in samples if sample.weights.any()), key=pack_key)
        old = {id(sample): own for sample, own in zip(samples, old_logprobs or [], strict=bool(old_logprobs))}
        written = sum(sample.num_answer_tokens for sample in learned)
        with_heads = bool(self.mtp_weight and self.model.config.num_mtp_heads)  # which read tokens across the seam
        for pack in packs(
            learned, self.tokens_per_microbatch, device=self.model.device, key=pack_key, share_prompts=not with_heads
        ):
            context, hidden = self._forward(pack)
            forward = self._tokens(pack, hidden, version, old)
            forward.states_ND.register_hook(functools.partial(_add_lengths, report.gradient_shares, pack))
            loss = objective(forward)
            loss.backward()
            if with_heads:
                heads_loss = self.mtp_weight * self._heads_loss(pack, hidden, context, written)
                heads_loss.backward(inputs=self._heads)  # not the embedding, which the heads read too
                losses.append(heads_loss.detach())
            losses.append(loss.detach())
            report.loss += float(loss.detach())
            entropies = _entropies(self.model, forward.states_ND, pack.temperature_N)
            diagnostics = batch_diagnostics(
                forward.batch, low=gate.get("low"), high=gate.get("high"), entropy_N=entropies
            )
            _add_means(sums, diagnostics, len(pack.labels_N))
            add_expert_load(report.load, context.routing, self.model)
            report.num_tokens += len(pack.tokens_T)
        gradients = clip_gradients(self.model, self.config.clip_norm, apart=self._heads)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        groups = list(dict.fromkeys(sample.group for sample in learned))
        where = f"step {version + 1} ({len(learned)} samples of the groups {', '.join(groups[:_MAX_NAMED])})"
        if self.guard.allows_step(torch.stack(losses), gradients, where, has_data=bool(learned)):
            self.optimizer.step()
            for layer, router in self.model.routers().items():
                if self.bias_rate and layer in report.load:
                    router.update_selection_bias(report.load[layer], self.bias_rate)
            self._probe = learned[:1]
        self.optimizer.zero_grad(set_to_none=True)
        report.gradient_norm, report.num_zero_gradients = float(gradients.norm), int(gradients.num_zeros)
        report.diagnostics = _means(sums)
        whole = sum(report.gradient_shares.values())
        report.gradient_shares = {domain: own / (whole or 1.0) for domain, own in report.gradient_shares.items()}
        return report

    def check_weights(self, where: str) -> None:
        """Raises DivergedError if the weights are not finite, or cannot be learned from any more."""
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

    def _heads_loss(self, pack: PackedSamples, hidden: Hidden, context: PackedContext, written: int) -> torch.Tensor:
        """Cross-entropy of the MTP heads on written tokens, cut off from the trunk and the output head."""
        mask_T = torch.zeros(len(pack.tokens_T), dtype=torch.bool, device=self.model.device)
        mask_T[pack.rows_N + 1] = True
        heads = self.model.config.num_mtp_heads
        batch = micro_batch(pack.tokens_T, pack.lengths, mask_T, heads)
        trunk = Hidden(hidden.pre_norm_TD.detach(), hidden.post_norm_TD.detach())
        states = self.model(None, context, shifted_tokens(batch), hidden=trunk).mtp_TD
        losses = []
        for states_TD, labels_T in zip(states.values(), batch.labels[1:], strict=True):
            losses.append(-self.model.head.logprobs(states_TD, labels_T).sum() / max(written, 1))
        return torch.stack(losses).mean()


def weighted_sum(token_losses: Callable[[TokenBatch], torch.Tensor]) -> Objective:
    """The objective of algorithms that need nothing but the numbers of tokens."""
    return lambda forward: (token_losses(forward.batch) * forward.weights_N).sum()


@torch.no_grad()
def score_samples(
    model: MiMo, samples: list[Sample], *, tokens_per_microbatch: int = 8192, replay: bool = True
) -> list[np.ndarray]:
    """Log-probabilities of the tokens of each sample under `model`, float64 [T]; 0.0 outside the mask."""
    scores = []
    for pack in packs(samples, tokens_per_microbatch, device=model.device, share_prompts=True):
        hidden = model(pack.tokens_T, pack.context(RoutingTape(replayed=pack.routes(model) if replay else {})))
        logprobs_N = _logprobs(model, hidden.post_norm_TD[pack.rows_N], pack).cpu()
        counts = [sample.num_answer_tokens for sample in pack.samples]
        scores += map(spread, pack.samples, logprobs_N.split(counts))
    return scores


def packs(
    samples: Iterable[Sample],
    tokens_per_pack: int,
    *,
    device: torch.device,
    key: Callable[[Sample], str] = lambda sample: "",
    share_prompts: bool = False,
) -> Iterable[PackedSamples]:
    """Whole samples in order, as many together as fit; different keys apart.

    share_prompts: neighbors with the same prompt, routed the same, have it once.
    """
    waiting: list[Sample] = []
    size = 0
    for sample in samples:
        new = len(sample)
        if share_prompts and waiting and _have_one_prompt(waiting[-1], sample):
            new -= sample.prompt_length
        if waiting and (size + new > tokens_per_pack or key(waiting[0]) != key(sample)):
            yield pack_samples(waiting, device=device, share_prompts=share_prompts)
            waiting, size, new = [], 0, len(sample)
        waiting.append(sample)
        size += new
    if waiting:
        yield pack_samples(waiting, device=device, share_prompts=share_prompts)


def pack_samples(samples: list[Sample], *, device: torch.device, share_prompts: bool = False) -> PackedSamples:
    """One pack of these samples. The first token of a sample cannot have been written: nothing predicts it."""
    groups, source, rows, origin, start = [], [], [], 0, 0
    for members in _members(samples, share_prompts):
        prompt = len(members[0]) if len(members) == 1 else members[0].prompt_length
        source.append(np.arange(origin, origin + prompt))
        answer_start, answers = start + prompt, []
        for sample in members:
            answers.append(len(sample) - prompt)
            source.append(np.arange(origin + prompt, origin + len(sample)))
            before = _written_places(sample) - 1
            rows.append(np.where(before < prompt, start + before, answer_start + before - prompt))
            origin += len(sample)
            answer_start += answers[-1]
        groups.append(PromptGroup(prompt, tuple(answers) if len(members) > 1 else ()))
        start = answer_start
    tokens = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    labels = np.concatenate([sample.token_ids[sample.loss_mask] for sample in samples]).astype(np.int64)
    counts = torch.tensor([sample.num_answer_tokens for sample in samples], device=device)
    temperatures = torch.tensor([sample.temperature for sample in samples], dtype=torch.float32, device=device)
    source_T = np.concatenate(source)
    return PackedSamples(
        samples=samples,
        tokens_T=torch.from_numpy(tokens[source_T]).to(device),
        groups=tuple(groups),
        source_T=torch.from_numpy(source_T).to(device),
        rows_N=torch.from_numpy(np.concatenate(rows)).to(device),
        labels_N=torch.from_numpy(labels).to(device),
        sequence_N=torch.arange(len(samples), device=device).repeat_interleave(counts),
        temperature_N=temperatures.repeat_interleave(counts),
    )


def _members(samples: list[Sample], share_prompts: bool) -> list[list[Sample]]:
    """Neighbors with the same prompt together, if prompts are shared; otherwise each alone."""
    members: list[list[Sample]] = []
    for sample in samples:
        if share_prompts and members and _have_one_prompt(members[-1][-1], sample):
            members[-1].append(sample)
        else:
            members.append([sample])
    return members


def _have_one_prompt(one: Sample, other: Sample) -> bool:
    """Whether the tokens before the first written one, and their routes, are the same; False if nothing was written."""
    length = one.prompt_length
    if length == len(one) or length != other.prompt_length or length == len(other):
        return False
    if (one.routed_experts is None) != (other.routed_experts is None):
        return False
    return np.array_equal(one.token_ids[:length], other.token_ids[:length]) and (
        one.routed_experts is None or np.array_equal(one.routes[:length], other.routes[:length])
    )


def _written_places(sample: Sample) -> np.ndarray:
    if sample.loss_mask[:1].any():
        raise ValueError(f"A sample of group {sample.group!r} has its first token in the loss mask.")
    return np.flatnonzero(sample.loss_mask)


def replayed_routes(
    model: MiMo, samples: list[Sample], *, source_T: torch.Tensor | None = None
) -> dict[int, torch.Tensor]:
    """Recorded routes of samples by layer, int16 [T, A]; -1, and so the choice of the router, where there are none.

    The engine never reads the last token of a sample, so it has no row there.

    Args:
        source_T: Which tokens of the samples, one after another, to take (None: all).

    Raises:
        ValueError: Routes of another model.
    """
    layers = sorted(model.routers())
    if not layers or all(sample.routed_experts is None for sample in samples):
        return {}
    total = sum(map(len, samples))
    routes_TLA = np.full((total, len(layers), model.config.moe.experts_per_token), NOT_RECORDED, dtype=np.int16)
    start = 0
    for sample in samples:
        own = routes_TLA[start : start + len(sample)]
        start += len(sample)
        if sample.routed_experts is not None:
            recorded = sample.routes
            if recorded.shape[1:] != own.shape[1:] or len(recorded) > len(own):
                raise ValueError(
                    f"A sample of group {sample.group!r} has routes of shape {recorded.shape}; its {len(own)} "
                    f"tokens and this model need at most {own.shape}."
                )
            own[: len(recorded)] = recorded
    routes = torch.from_numpy(routes_TLA)
    if source_T is not None and len(source_T) < total:
        routes = routes[source_T.cpu()]
    routes = routes.to(model.device)
    return {layer: routes[:, place] for place, layer in enumerate(layers)}


def _logprobs(model: MiMo, states_ND: torch.Tensor, pack: PackedSamples) -> torch.Tensor:
    return model.head.logprobs(states_ND, pack.labels_N, pack.temperature_N)


@torch.no_grad()
def _entropies(model: MiMo, states_ND: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """The policy's entropy in nats at evenly spaced rows, at most ENTROPY_ROWS of them, [rows]."""
    rows = torch.arange(0, len(states_ND), -(-len(states_ND) // ENTROPY_ROWS), device=states_ND.device)
    logprobs_RV = (model.head(states_ND[rows]) / temperature_N[rows, None]).log_softmax(dim=-1)
    return -(logprobs_RV.exp() * logprobs_RV).sum(dim=-1)


def _add_lengths(by_domain: dict[str, float], pack: PackedSamples, gradient_ND: torch.Tensor) -> None:
    """Adds the lengths of the rows of a gradient to their samples' domains."""
    lengths_B = torch.zeros(len(pack.samples), device=gradient_ND.device)
    lengths_B.index_add_(0, pack.sequence_N, gradient_ND.detach().float().norm(dim=-1))
    for sample, length in zip(pack.samples, lengths_B.tolist(), strict=True):
        by_domain[sample.domain] = by_domain.get(sample.domain, 0.0) + length


def _add_means(sums: dict[str, list[tuple[float, int]]], values: dict[str, float], count: int) -> None:
    for name, value in values.items():
        sums.setdefault(name, []).append((value, count))


def _means(sums: dict[str, list[tuple[float, int]]]) -> dict[str, float]:
    """Means over micro-batches by their tokens; of maxima, the maximum."""
    means = {}
    for name, pairs in sums.items():
        if "max" in name:
            means[name] = max(value for value, _ in pairs)
        else:
            means[name] = sum(value * count for value, count in pairs) / max(1, sum(count for _, count in pairs))
    return means
