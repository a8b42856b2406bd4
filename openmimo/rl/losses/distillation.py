"""Divergences between student and teacher at each token, over the whole vocabulary, its top, or the sampled token.

From logits: [N, V] of the student, with gradient, and of the teacher, without; each gives [N], float32 or float64, with
the gradient of the student at that token only (the tokens before it are taken as given, as in equation 5 of
2601.02780). Logits of -inf, such as those of padding of the vocabulary, give finite values and gradients.

N tokens, V vocabulary, K largest logits of the teacher.
"""

import math

import torch

LOWEST_LOGIT = -1e4
LOWEST_TEACHER_LOGPROB = -100.0


def reverse_kl(student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor) -> torch.Tensor:
    """Σ p_S (log p_S - log p_T), [N]: what MOPD lowers, without its sampling noise."""
    student_NV, teacher_NV = _logprobs(student_logits_NV), _teacher_logprobs(teacher_logits_NV)
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(dim=-1)


def forward_kl(student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor) -> torch.Tensor:
    """Σ p_T (log p_T - log p_S), [N]: the loss of distillation on the teacher's own distribution."""
    student_NV, teacher_NV = _logprobs(student_logits_NV), _teacher_logprobs(teacher_logits_NV)
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(dim=-1)


def jensen_shannon(
    student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, *, beta: float = 0.5
) -> torch.Tensor:
    """beta KL(p_T, m) + (1 - beta) KL(p_S, m) with m = beta p_T + (1 - beta) p_S, [N], for 0 < beta < 1.

    Divided by beta it becomes the forward KL as beta goes to 0, and by 1 - beta the reverse KL as beta goes to 1, so
    those ends are given as these (GKD, 2306.13649). Raises ValueError for a beta outside 0 to 1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must be from 0 (forward KL) to 1 (reverse KL).")
    if beta == 0:
        return forward_kl(student_logits_NV, teacher_logits_NV)
    if beta == 1:
        return reverse_kl(student_logits_NV, teacher_logits_NV)
    student_NV, teacher_NV = _logprobs(student_logits_NV), _teacher_logprobs(teacher_logits_NV)
    mixture_NV = torch.logaddexp(teacher_NV + math.log(beta), student_NV + math.log(1 - beta))
    from_teacher_N = (teacher_NV.exp() * (teacher_NV - mixture_NV)).sum(dim=-1)
    from_student_N = (student_NV.exp() * (student_NV - mixture_NV)).sum(dim=-1)
    return beta * from_teacher_N + (1 - beta) * from_student_N


def teacher_top_k(teacher_logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens: their log-probabilities [N, K], under the whole vocabulary, and ids [N, K]."""
    return _teacher_logprobs(teacher_logits_NV).topk(k, dim=-1)


def top_k_reverse_kl(
    student_logits_NV: torch.Tensor, teacher_logprobs_NK: torch.Tensor, teacher_ids_NK: torch.Tensor
) -> torch.Tensor:
    """Σ over the teacher's top k of p_S log(p_S / p_T) - p_S + p_T, [N]; `teacher_top_k` gives the two inputs.

    Every summand is 0 or more, and 0 only where p_S = p_T: the correction - p_S + p_T keeps the optimum at the teacher,
    which a cut-off sum alone would move. With k = V it is the reverse KL (MOPD follow-up, 2606.30406).
    """
    student_NK = _logprobs(student_logits_NV).gather(-1, teacher_ids_NK)
    teacher_NK = teacher_logprobs_NK.detach().clamp(min=LOWEST_TEACHER_LOGPROB).to(student_NK.dtype)
    student_probabilities_NK = student_NK.exp()
    summands_NK = student_probabilities_NK * (student_NK - teacher_NK) - student_probabilities_NK + teacher_NK.exp()
    return summands_NK.sum(dim=-1)


def k1(logprobs_N: torch.Tensor, teacher_logprobs_N: torch.Tensor) -> torch.Tensor:
    """log p_S - log p_T of sampled tokens, [N]: its mean estimates the reverse KL. To look at, not to minimise.

    Its gradient is that of log p_S, in which the teacher does not occur and whose mean is zero. Raises ValueError if it
    would be differentiated; to lower the reverse KL, use `teacher_advantages` with `reinforce`, or `k2`.
    """
    if logprobs_N.requires_grad:
        raise ValueError(
            "k1 = log p_S - log p_T has no teacher in its gradient, so it cannot be a loss. Detach it to log it; use "
            "teacher_advantages with reinforce, k2 or reverse_kl to train."
        )
    return logprobs_N - teacher_logprobs_N


def k2(logprobs_N: torch.Tensor, teacher_logprobs_N: torch.Tensor) -> torch.Tensor:
    """(log p_S - log p_T)² / 2 of sampled tokens, [N]: biased as a value; its mean gradient is the reverse KL's."""
    return (logprobs_N - teacher_logprobs_N.detach()).square() / 2


def k3(logprobs_N: torch.Tensor, teacher_logprobs_N: torch.Tensor) -> torch.Tensor:
    """p_T / p_S - 1 - log(p_T / p_S) of sampled tokens, [N]: never negative, and its mean is the reverse KL.

    Its mean gradient, however, is the *forward* KL's.
    """
    log_ratio_N = teacher_logprobs_N.detach() - logprobs_N
    return log_ratio_N.exp() - 1 - log_ratio_N


def _logprobs(logits_NV: torch.Tensor) -> torch.Tensor:
    """log softmax in float32 or float64. -inf becomes a logit so low that its probability is 0 exactly, not 0 * inf."""
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return wide_NV.clamp(min=LOWEST_LOGIT).log_softmax(dim=-1)


def _teacher_logprobs(logits_NV: torch.Tensor) -> torch.Tensor:
    """The same without gradient, and with a floor, so that one impossible token does not outweigh everything."""
    return _logprobs(logits_NV.detach()).clamp(min=LOWEST_TEACHER_LOGPROB)
