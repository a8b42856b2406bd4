"""Divergences between student and teacher at each token, over the vocabulary or the teacher's top k.

The inputs are logits [N, V] of the student (with gradient) and of the teacher (without). The results are [N], float32
or float64, with the gradient of the student at that token only: preceding tokens are fixed, as in equation 5 of
2601.02780. Logits of -inf, e.g. of vocabulary padding, give finite values and gradients.

N tokens, V vocabulary, K largest logits of the teacher.
"""

import torch

LOWEST_LOGIT = -1e4
LOWEST_TEACHER_LOGPROB = -100.0


def reverse_kl(student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor) -> torch.Tensor:
    """Σ p_S (log p_S - log p_T), [N]: the objective of MOPD without sampling noise."""
    student_NV, teacher_NV = _logprobs(student_logits_NV), _teacher_logprobs(teacher_logits_NV)
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(dim=-1)


def forward_kl(student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor) -> torch.Tensor:
    """Σ p_T (log p_T - log p_S), [N]: the loss of distillation on the teacher's distribution."""
    student_NV, teacher_NV = _logprobs(student_logits_NV), _teacher_logprobs(teacher_logits_NV)
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(dim=-1)


def teacher_top_k(teacher_logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens: their log-probabilities [N, K], under the whole vocabulary, and ids [N, K]."""
    return _teacher_logprobs(teacher_logits_NV).topk(k, dim=-1)


def top_k_reverse_kl(
    student_logits_NV: torch.Tensor, teacher_logprobs_NK: torch.Tensor, teacher_ids_NK: torch.Tensor
) -> torch.Tensor:
    """Σ over the teacher's top k of p_S log(p_S / p_T) - p_S + p_T, [N]; `teacher_top_k` gives the two inputs.

    Every summand is non-negative, and 0 only if p_S = p_T. The correction - p_S + p_T keeps the optimum at the teacher,
    which a truncated sum alone would shift. With k = V it is the reverse KL (MOPD follow-up, 2606.30406).
    """
    student_NK = _logprobs(student_logits_NV).gather(-1, teacher_ids_NK)
    teacher_NK = teacher_logprobs_NK.detach().clamp(min=LOWEST_TEACHER_LOGPROB).to(student_NK.dtype)
    student_probabilities_NK = student_NK.exp()
    summands_NK = student_probabilities_NK * (student_NK - teacher_NK) - student_probabilities_NK + teacher_NK.exp()
    return summands_NK.sum(dim=-1)


def _logprobs(logits_NV: torch.Tensor) -> torch.Tensor:
    """log softmax in float32 or float64. A low logit replaces -inf; its probability is exactly 0 (not 0 * inf)."""
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return wide_NV.clamp(min=LOWEST_LOGIT).log_softmax(dim=-1)


def _teacher_logprobs(logits_NV: torch.Tensor) -> torch.Tensor:
    """The same without gradient and with a floor, so that one impossible token does not dominate the sum."""
    return _logprobs(logits_NV.detach()).clamp(min=LOWEST_TEACHER_LOGPROB)
