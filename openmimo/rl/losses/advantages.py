"""How much better than expected: of whole answers from rewards, of single tokens from a teacher.

Nothing here is ever whitened over the batch: that would destroy the scale and the sign of a teacher's advantages.

B sequences of a step, N policy-written tokens of it.
"""

import torch


def grpo_advantages(rewards_B: torch.Tensor, groups_B: torch.Tensor, *, epsilon: float = 1e-6) -> torch.Tensor:
    """(reward - group mean) / (group std + epsilon), [B]; 0 where all rewards of the group are the same.

    `groups_B` is int64, 0 and up: the answers to one prompt share a number. The std is over the group itself (divided
    by n, not n - 1). GRPO (DeepSeekMath, 2402.03300), as MiMo-7B uses it (2505.07608, section 3.3).
    """
    centered_B = dr_grpo_advantages(rewards_B, groups_B)
    std_B = _group_mean(centered_B.square(), groups_B).sqrt()
    return centered_B / (std_B + epsilon)


def dr_grpo_advantages(rewards_B: torch.Tensor, groups_B: torch.Tensor) -> torch.Tensor:
    """reward - group mean, [B]: no division by the std, which favors prompts that are nearly always or never solved.

    Exactly 0 where all rewards of the group are the same. Dr. GRPO (2503.20783).
    """
    constant_B = _group_extreme(rewards_B, groups_B, "amax") == _group_extreme(rewards_B, groups_B, "amin")
    return (rewards_B - _group_mean(rewards_B, groups_B)).masked_fill(constant_B, 0.0)


def rloo_advantages(rewards_B: torch.Tensor, groups_B: torch.Tensor) -> torch.Tensor:
    """reward - mean reward of the *other* answers to the prompt, [B]; 0 for an only answer. RLOO (2402.14740).

    That baseline does not depend on the answer itself, so the gradient is unbiased.
    """
    sizes_B = torch.bincount(groups_B)[groups_B]
    return dr_grpo_advantages(rewards_B, groups_B) * sizes_B / (sizes_B - 1).clamp(min=1)


def teacher_advantages(
    teacher_logprobs_N: torch.Tensor, policy_logprobs_N: torch.Tensor, *, limit: float
) -> torch.Tensor:
    """clip(log π_teacher - log π_θ, -limit, limit), [N], detached (MOPD, 2601.02780, equation 8).

    A teacher log-probability of NaN says that the teacher gave none: the advantage is 0, not a guess. -inf is a token
    that the teacher never writes: -limit. Raises ValueError if the policy's log-probabilities are not finite, or are
    all 0, which is what a skipped forward pass leaves behind.
    """
    teacher_logprobs_N, policy_logprobs_N = teacher_logprobs_N.detach(), policy_logprobs_N.detach()
    if teacher_logprobs_N.shape != policy_logprobs_N.shape:
        raise ValueError(
            f"The teacher scored {tuple(teacher_logprobs_N.shape)} tokens and the policy "
            f"{tuple(policy_logprobs_N.shape)}; both must score the same tokens."
        )
    if not policy_logprobs_N.isfinite().all():
        raise ValueError("The policy's log-probabilities hold NaN or infinity, so no advantage can be taken from them.")
    if len(policy_logprobs_N) and (policy_logprobs_N == 0).all():
        raise ValueError(
            "The policy's log-probabilities are all 0: they were never computed. Distillation needs the trainer's "
            "forward pass over the rollouts, even where nothing else does."
        )
    gap_N = teacher_logprobs_N - policy_logprobs_N
    return gap_N.clamp(-limit, limit).masked_fill(teacher_logprobs_N.isnan(), 0.0)


def mopd_advantages(
    teacher_advantages_N: torch.Tensor, outcome_advantages_N: torch.Tensor, *, alpha: float
) -> torch.Tensor:
    """The teacher's advantages plus alpha times those of the outcome, [N] (MOPD, 2601.02780, equation 9).

    Where the teacher gave nothing, the outcome alone counts.
    """
    return teacher_advantages_N + alpha * outcome_advantages_N


def _group_mean(values_B: torch.Tensor, groups_B: torch.Tensor) -> torch.Tensor:
    """The mean of each answer's group, [B]."""
    sizes = torch.bincount(groups_B)
    return (values_B.new_zeros(len(sizes)).index_add(0, groups_B, values_B) / sizes)[groups_B]


def _group_extreme(values_B: torch.Tensor, groups_B: torch.Tensor, reduction: str) -> torch.Tensor:
    """The largest ("amax") or smallest ("amin") value of each answer's group, [B]."""
    empty = values_B.new_zeros(len(torch.bincount(groups_B)))
    return empty.scatter_reduce(0, groups_B, values_B, reduction, include_self=False)[groups_B]
