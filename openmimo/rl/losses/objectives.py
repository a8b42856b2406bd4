"""Policy losses per token, whose minimization makes tokens with positive advantage more likely.

The functions do not reduce over tokens: weights (`normalize`) and corrections for the engine's probabilities
(`corrections`) are applied separately.

The policy ratio is π_θ / π_old ("decoupled": the trainer before and after its updates; `corrections` covers the
mismatch with the engine), or π_θ / μ ("bypass": the engine is the old policy, and no correction by the same ratio may
be added).

N policy-written tokens, B sequences.
"""

import math
from typing import Literal

import torch

from openmimo.rl.losses.tokens import TokenBatch

OldPolicy = Literal["decoupled", "bypass"]
LOG_RATIO_LIMIT = 20.0


def policy_log_ratio(batch: TokenBatch, old_policy: OldPolicy) -> torch.Tensor:
    """log π_θ - log π_old, or - log μ, [N], with the gradient of log π_θ.

    Clamped to ±20, because a ratio that overflows gives NaN gradients even if it is clipped later.
    """
    old_logprobs_N = batch.old_logprobs_N if old_policy == "decoupled" else batch.behavior_logprobs_N
    return (batch.logprobs_N - old_logprobs_N.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped(
    batch: TokenBatch, *, low: float, high: float, dual: float = math.inf, old_policy: OldPolicy = "decoupled"
) -> torch.Tensor:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), [N]: PPO (1707.06347); high > low is DAPO's clip-higher.

    With `dual` (above 1), the loss of tokens with negative advantage is at most dual * |A| (dual clip, 1912.09729).
    MiMo-7B: low 0.2, high 0.28 (2505.07608, section 3.3).
    """
    return _clipped_loss(policy_log_ratio(batch, old_policy).exp(), batch, low=low, high=high, dual=dual)


def gspo(batch: TokenBatch, *, low: float, high: float, old_policy: OldPolicy = "decoupled") -> torch.Tensor:
    """The clipped loss with one ratio per sequence, the geometric mean of its token ratios, [N].

    The ratio is sg[s] * π_θ / sg[π_θ]: its value is the sequence ratio s, and its gradient is that of each token. The
    mean over the tokens of a sequence has the gradient of the clipped sequence loss. GSPO (2507.18071, "GSPO-token").
    """
    sequence_log_ratio_B = batch.sequence_mean(policy_log_ratio(batch, old_policy).detach())
    ratio_N = batch.per_token(sequence_log_ratio_B.exp()) * (batch.logprobs_N - batch.logprobs_N.detach()).exp()
    return _clipped_loss(ratio_N, batch, low=low, high=high, dual=math.inf)


def cispo(
    batch: TokenBatch, *, low_ratio: float, high_ratio: float, old_policy: OldPolicy = "decoupled"
) -> torch.Tensor:
    """-sg[clip(ratio, low_ratio, high_ratio)] * A * log π_θ, [N]: clipping bounds the weight of a token and never
    removes its gradient. CISPO (MiniMax-M1, 2506.13585).
    """
    weights_N = policy_log_ratio(batch, old_policy).detach().exp().clamp(low_ratio, high_ratio)
    return weights_N * reinforce(batch)


def reinforce(batch: TokenBatch) -> torch.Tensor:
    """-A * log π_θ, [N]. With the gate of equation 8 as correction, it is the loss of MOPD (2601.02780, equation 7)."""
    return -batch.advantages_N.detach() * batch.logprobs_N


def _clipped_loss(ratio_N: torch.Tensor, batch: TokenBatch, *, low: float, high: float, dual: float) -> torch.Tensor:
    advantages_N = batch.advantages_N.detach()
    gain_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - low, 1 + high) * advantages_N)
    if dual < math.inf:
        gain_N = torch.where(advantages_N < 0, torch.maximum(gain_N, dual * advantages_N), gain_N)
    return -gain_N
