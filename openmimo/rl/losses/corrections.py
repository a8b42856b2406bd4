"""Importance weights that correct for the mismatch between the trained policy and the sampling engine.

Each function takes `log_ratio_N`, log π_train - log μ, and returns detached weights [N]. With `apply`, a weight of 0
removes a token's loss and its gradient. Gates (0 or 1) may be multiplied with other weights.

N policy-written tokens, B sequences.
"""

import math

import torch

from openmimo.rl.losses.tokens import TokenBatch


def apply(losses_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """losses * weights, [N]. A weight of 0 gives 0 and no gradient, even for an infinite loss."""
    return torch.where(weights_N == 0, 0.0, losses_N) * weights_N


def truncated(log_ratio_N: torch.Tensor, *, high: float) -> torch.Tensor:
    """min(ratio, high): truncated importance sampling (TIS)."""
    return log_ratio_N.detach().exp().clamp(max=high)


def masked(log_ratio_N: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """The ratio if low <= ratio <= high, else 0: IcePop, the gate of MOPD (2601.02780, equation 8)."""
    ratio_N = log_ratio_N.detach().exp()
    return ratio_N.masked_fill((ratio_N < low) | (ratio_N > high), 0.0)


def clipped(log_ratio_N: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """The ratio, clipped to [low, high] (CIS)."""
    return log_ratio_N.detach().exp().clamp(low, high)


def sequence_masked(log_ratio_N: torch.Tensor, batch: TokenBatch, *, low: float, high: float) -> torch.Tensor:
    """A gate: 1 for all tokens of a sequence whose geometric mean ratio is within [low, high], else 0."""
    mean_ratio_B = batch.sequence_mean(log_ratio_N.detach()).exp()
    return batch.per_token(((mean_ratio_B >= low) & (mean_ratio_B <= high)).to(log_ratio_N.dtype))


def sequence_truncated(log_ratio_N: torch.Tensor, batch: TokenBatch, *, high: float) -> torch.Tensor:
    """min(sequence ratio, high): the product of the token ratios of a sequence, the same for all its tokens."""
    log_ratio_B = batch.sequence_sum(log_ratio_N.detach())
    return batch.per_token(log_ratio_B.clamp(max=math.log(high)).exp())


def veto(log_ratio_N: torch.Tensor, batch: TokenBatch, *, lowest: float = 1e-4) -> torch.Tensor:
    """A gate: 0 for all tokens of a sequence in which any token's ratio is below `lowest`, else 1."""
    is_below_N = (log_ratio_N.detach() < math.log(lowest)).to(log_ratio_N.dtype)
    return batch.per_token((batch.sequence_sum(is_below_N) == 0).to(log_ratio_N.dtype))


def staleness_limit(staleness_N: torch.Tensor, *, high: float, decay: float) -> torch.Tensor:
    """C(s) = 1 + (high - 1) * decay^s, [N] float32: the limit of ratios above 1 decreases with the age of a token."""
    return 1 + (high - 1) * decay ** staleness_N.to(torch.float32)


def staleness_truncated(
    log_ratio_N: torch.Tensor,
    staleness_N: torch.Tensor,
    *,
    high: float,
    decay: float,
    max_staleness: int,
    low: float = 0.0,
) -> torch.Tensor:
    """min(ratio, C(staleness)); 0 for tokens older than `max_staleness` versions, or with a ratio below `low`.

    For rollouts that began under an older policy. 2601.02780, section 4.6.2 names the method without a formula; C(s),
    `staleness_limit`, is our choice.
    """
    ratio_N = log_ratio_N.detach().exp()
    limit_N = staleness_limit(staleness_N, high=high, decay=decay).to(ratio_N.dtype)
    return torch.minimum(ratio_N, limit_N).masked_fill((staleness_N > max_staleness) | (ratio_N < low), 0.0)
