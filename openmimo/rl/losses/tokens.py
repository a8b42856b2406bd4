"""The input of a policy loss, the policy-written tokens of a micro-batch with their numbers; and diagnostics of it.

The diagnostics log the mismatch between trainer and engine directly, not only through the share of gated tokens: a
fixed gate may drop fewer tokens while the mismatch grows.

N policy-written tokens of a micro-batch, B sequences of it, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenBatch:
    """The policy-written tokens of whole sequences, without prompts and tool responses.

    A sequence is never split over batches, because sequence ratios (GSPO) and sequence gates need all of its tokens.

    Attributes:
        logprobs_N: log π_θ, by the trainer, with gradient.
        old_logprobs_N: log π_old, by the trainer before the first update of the step.
        behavior_logprobs_N: log μ, by the engine that sampled the token.
        advantages_N: The advantage of each token.
        sequence_N: int64, 0 to B - 1, the sequence of each token.
        staleness_N: int64, the current policy version minus the one that sampled the token.
        num_sequences: B.

    Raises:
        ValueError: The tensors differ in length.
    """

    logprobs_N: torch.Tensor
    old_logprobs_N: torch.Tensor
    behavior_logprobs_N: torch.Tensor
    advantages_N: torch.Tensor
    sequence_N: torch.Tensor
    staleness_N: torch.Tensor
    num_sequences: int

    def __post_init__(self) -> None:
        shape = self.logprobs_N.shape
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        wrong = {name: tuple(value.shape) for name, value in tensors.items() if value.shape != shape}
        if len(shape) != 1 or wrong:
            raise ValueError(
                f"The tensors of a token batch must all be [N]; logprobs_N is {tuple(shape)}, but {wrong}."
            )

    def sequence_sum(self, values_N: torch.Tensor) -> torch.Tensor:
        """The sum of each sequence's values: [N] to [B]."""
        return values_N.new_zeros(self.num_sequences).index_add(0, self.sequence_N, values_N)

    def sequence_mean(self, values_N: torch.Tensor) -> torch.Tensor:
        """The mean of each sequence's values: [N] to [B]. A sequence without tokens gives 0."""
        return self.sequence_sum(values_N) / self.sequence_sum(torch.ones_like(values_N)).clamp(min=1)

    def per_token(self, values_B: torch.Tensor) -> torch.Tensor:
        """The sequence value for each token: [B] to [N]."""
        return values_B[self.sequence_N]


LOWEST_DOMAIN_SCALE, HIGHEST_DOMAIN_SCALE = 0.25, 4.0


EXTREME_RATIOS = (2, 5, 10)


def batch_diagnostics(
    batch: TokenBatch,
    *,
    low: float | None = None,
    high: float | None = None,
    entropy_N: torch.Tensor | None = None,
) -> dict[str, float]:
    """All diagnostics of a batch; empty for an empty batch.

    Args:
        batch: The tokens.
        low: Lower bound of the gate, if any.
        high: Upper bound of the gate, if any.
        entropy_N: Entropy of the policy in nats at some of the tokens.
    """
    if not len(batch.logprobs_N):
        return {}
    metrics = mismatch(batch.logprobs_N, batch.behavior_logprobs_N)
    metrics |= gate_shares(batch.logprobs_N - batch.behavior_logprobs_N, low=low, high=high)
    metrics["staleness_mean"] = float(batch.staleness_N.double().mean())
    metrics["staleness_max"] = float(batch.staleness_N.max())
    if entropy_N is not None:
        metrics["entropy"] = float(entropy_N.detach().mean())
    return metrics


def mismatch(logprobs_N: torch.Tensor, behavior_logprobs_N: torch.Tensor) -> dict[str, float]:
    """The mismatch between trainer and engine on the sampled tokens, with r = π / μ.

    mismatch_k1: mean log μ - log π. mismatch_k3: mean r - 1 - log r. logprob_difference_mean, _max: of |log π - log μ|.
    extreme_ratio_share_τ: share of tokens with max(r, 1 / r) > τ, the F(τ) of R3 (2510.11370).
    """
    log_ratio_N = (logprobs_N.detach() - behavior_logprobs_N.detach()).double()
    distance_N = log_ratio_N.abs()
    metrics = {
        "mismatch_k1": float(-log_ratio_N.mean()),
        "mismatch_k3": float((log_ratio_N.exp() - 1 - log_ratio_N).mean()),
        "logprob_difference_mean": float(distance_N.mean()),
        "logprob_difference_max": float(distance_N.max()),
    }
    shares = {f"extreme_ratio_share_{limit}": _share(distance_N.exp() > limit) for limit in EXTREME_RATIOS}
    return metrics | shares


def gate_shares(log_ratio_N: torch.Tensor, *, low: float | None, high: float | None) -> dict[str, float]:
    """gated_low_share, gated_high_share: shares of tokens with a ratio below `low`, above `high` (None: omitted)."""
    ratio_N = log_ratio_N.detach().exp()
    metrics = {}
    if low is not None:
        metrics["gated_low_share"] = _share(ratio_N < low)
    if high is not None:
        metrics["gated_high_share"] = _share(ratio_N > high)
    return metrics


def top_k_overlap(student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, *, k: int) -> float:
    """The share of the teacher's k most probable tokens that are among the student's, over all tokens (2604.13016)."""
    student_NK = student_logits_NV.detach().topk(k, dim=-1).indices
    teacher_NK = teacher_logits_NV.detach().topk(k, dim=-1).indices
    return _share((teacher_NK[:, :, None] == student_NK[:, None, :]).any(dim=-1))


def _share(flags: torch.Tensor) -> float:
    return float(flags.double().mean())
