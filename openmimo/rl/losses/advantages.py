"""Advantages: of whole responses from rewards, of single tokens from a teacher.

No advantage is whitened over the batch, which would destroy the scale and the sign of a teacher's advantages.

B sequences of a step, N policy-written tokens of it.
"""

import torch


def grpo_advantages(rewards_B: torch.Tensor, groups_B: torch.Tensor, *, epsilon: float = 1e-6) -> torch.Tensor:
    """(reward - group mean) / (group std + epsilon), [B]; 0 if all rewards of the group are equal.

    `groups_B` is int64, from 0: the responses to one prompt share a number. The std is the population std of the group
    (divided by n, not n - 1). GRPO (DeepSeekMath, 2402.03300), as in MiMo-7B (2505.07608, section 3.3).
    """
    centered_B = dr_grpo_advantages(rewards_B, groups_B)
    std_B = _group_mean(centered_B.square(), groups_B).sqrt()
    return centered_B / (std_B + epsilon)


def dr_grpo_advantages(rewards_B: torch.Tensor, groups_B: torch.Tensor) -> torch.Tensor:
    """reward - group mean, [B], without the division by the std, which favors very easy and very hard prompts.

    Exactly 0 if all rewards of the group are equal. Dr. GRPO (2503.20783).
    """
    constant_B = _group_extreme(rewards_B, groups_B, "amax") == _group_extreme(rewards_B, groups_B, "amin")
    return (rewards_B - _group_mean(rewards_B, groups_B)).masked_fill(constant_B, 0.0)


def rloo_advantages(rewards_B: torch.Tensor, groups_B: torch.Tensor) -> torch.Tensor:
    """reward - mean reward of the *other* responses to the prompt, [B]; 0 for a single response. RLOO (2402.14740).

    The baseline is independent of the response itself, so the gradient is unbiased.
    """
    sizes_B = torch.bincount(groups_B)[groups_B]
    return dr_grpo_advantages(rewards_B, groups_B) * sizes_B / (sizes_B - 1).clamp(min=1)


def teacher_advantages(
    teacher_logprobs_N: torch.Tensor, policy_logprobs_N: torch.Tensor, *, limit: float
) -> torch.Tensor:
    """clip(log π_teacher - log π_θ, -limit, limit), [N], detached (MOPD, 2601.02780, equation 8).

    A teacher log-probability of NaN means that the teacher gave none: the advantage is 0. -inf is a token that the
    teacher never writes: the advantage is -limit.

    Raises:
        ValueError: The policy's log-probabilities are not finite, or all are 0 (a skipped forward pass).
    """
    teacher_logprobs_N, policy_logprobs_N = teacher_logprobs_N.detach(), policy_logprobs_N.detach()
    if teacher_logprobs_N.shape != policy_logprobs_N.shape:
        raise ValueError(
            f"The teacher scored {tuple(teacher_logprobs_N.shape)} tokens and the policy "
            f"{tuple(policy_logprobs_N.shape)}; both must score the same tokens."
        )
    if not policy_logprobs_N.isfinite().all():
        raise ValueError("The policy's log-probabilities contain NaN or infinity, so no advantage can be computed.")
    if len(policy_logprobs_N) and (policy_logprobs_N == 0).all():
        raise ValueError(
            "The policy's log-probabilities are all 0: they were not computed. Distillation needs the trainer's "
            "forward pass over the rollouts."
        )
    gap_N = teacher_logprobs_N - policy_logprobs_N
    return gap_N.clamp(-limit, limit).masked_fill(teacher_logprobs_N.isnan(), 0.0)


def mopd_advantages(
    teacher_advantages_N: torch.Tensor, outcome_advantages_N: torch.Tensor, *, alpha: float
) -> torch.Tensor:
    """The teacher's advantages plus alpha times those of the outcome, [N] (MOPD, 2601.02780, equation 9).

    Without a teacher log-probability, the outcome alone counts.
    """
    return teacher_advantages_N + alpha * outcome_advantages_N


def _group_mean(values_B: torch.Tensor, groups_B: torch.Tensor) -> torch.Tensor:
    """The group mean for each response, [B]."""
    sizes = torch.bincount(groups_B)
    return (values_B.new_zeros(len(sizes)).index_add(0, groups_B, values_B) / sizes)[groups_B]


def _group_extreme(values_B: torch.Tensor, groups_B: torch.Tensor, reduction: str) -> torch.Tensor:
    """The group maximum ("amax") or minimum ("amin") for each response, [B]."""
    empty = values_B.new_zeros(len(torch.bincount(groups_B)))
    return empty.scatter_reduce(0, groups_B, values_B, reduction, include_self=False)[groups_B]
