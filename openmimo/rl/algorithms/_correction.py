"""Token losses with the correction that the options select.

N policy-written tokens.
"""

import torch

from openmimo.rl.algorithm import Correction, RatioOptions
from openmimo.rl.losses import corrections
from openmimo.rl.losses.tokens import TokenBatch


def correction_weights(batch: TokenBatch, log_ratio_N: torch.Tensor, correction: Correction) -> torch.Tensor:
    """The weights [N], detached, for log π_train - log μ."""
    weights_N = _kind_weights(batch, log_ratio_N, correction)
    if correction.veto_below > 0:
        weights_N = weights_N * corrections.veto(log_ratio_N, batch, lowest=correction.veto_below)
    return weights_N


def corrected_for_engine(losses_N: torch.Tensor, batch: TokenBatch, options: RatioOptions) -> torch.Tensor:
    """Losses that contain a policy ratio, times the remaining correction towards the engine, [N].

    Decoupled: the remaining ratio is π_old / μ. Bypass: the policy ratio already is π_θ / μ, and only a gate remains.
    """
    policy_logprobs_N = batch.old_logprobs_N if options.old_policy == "decoupled" else batch.logprobs_N
    log_ratio_N = policy_logprobs_N - batch.behavior_logprobs_N
    return corrections.apply(losses_N, correction_weights(batch, log_ratio_N, options.correction))


def corrected_for_policy(losses_N: torch.Tensor, batch: TokenBatch, correction: Correction) -> torch.Tensor:
    """Losses without a policy ratio, times the full correction from engine to policy, π_θ / μ, [N]."""
    log_ratio_N = batch.logprobs_N - batch.behavior_logprobs_N
    return corrections.apply(losses_N, correction_weights(batch, log_ratio_N, correction))


def _kind_weights(batch: TokenBatch, log_ratio_N: torch.Tensor, correction: Correction) -> torch.Tensor:
    limits = correction.limits()
    match correction.kind:
        case "none":
            return torch.ones_like(log_ratio_N)
        case "tis":
            return corrections.truncated(log_ratio_N, high=limits["high"])
        case "icepop":
            return corrections.masked(log_ratio_N, low=limits["low"], high=limits["high"])
        case "clip":
            return corrections.clipped(log_ratio_N, low=limits["low"], high=limits["high"])
        case "sequence_mask":
            return corrections.sequence_masked(log_ratio_N, batch, low=limits["low"], high=limits["high"])
        case "sequence_tis":
            return corrections.sequence_truncated(log_ratio_N, batch, high=limits["high"])
        case "staleness_tis":
            return corrections.staleness_truncated(
                log_ratio_N,
                batch.staleness_N,
                low=limits["low"],
                high=limits["high"],
                decay=limits["decay"],
                max_staleness=int(limits["max_staleness"]),
            )
