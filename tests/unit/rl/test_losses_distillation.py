"""Divergences against their definitions, and the estimators' gradients against the exact ones."""

import math

import pytest
import torch

from openmimo.rl.losses import distillation
from openmimo.rl.losses.advantages import teacher_advantages

INF = float("inf")
WHOLE = [
    distillation.reverse_kl,
    distillation.forward_kl,
    lambda student, teacher: distillation.top_k_reverse_kl(student, *distillation.teacher_top_k(teacher, 3)),
]


def logits(tokens=5, vocabulary=7):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    return student, teacher


def gradient(losses, student):
    return torch.autograd.grad(losses.sum(), student, retain_graph=True)[0]


def test_against_torch_distributions():
    student, teacher = logits()
    ours = torch.distributions.Categorical(logits=student)
    theirs = torch.distributions.Categorical(logits=teacher)
    divergence = torch.distributions.kl_divergence
    assert torch.allclose(distillation.reverse_kl(student, teacher), divergence(ours, theirs))
    assert torch.allclose(distillation.forward_kl(student, teacher), divergence(theirs, ours))


@pytest.mark.parametrize("divergence", WHOLE)
def test_zero_and_flat_at_the_teacher_only(divergence):
    student, teacher = logits()
    same = teacher.clone().requires_grad_()
    at_teacher = divergence(same, teacher)
    assert at_teacher.abs().max() < 1e-12
    assert gradient(at_teacher, same).abs().max() < 1e-12
    assert (divergence(student, teacher) > 1e-3).all()
    assert not divergence(student.detach(), teacher.clone().requires_grad_()).requires_grad


def test_corrected_top_k_summands():
    """Each summand is at least 0, and 0 only for equal probabilities; the truncated sum without correction is not."""
    student, teacher = logits()
    logprobs, ids = distillation.teacher_top_k(teacher, 3)
    summands = torch.stack(
        [distillation.top_k_reverse_kl(student, logprobs[:, i : i + 1], ids[:, i : i + 1]) for i in range(3)]
    )
    assert (summands > 0).all()
    assert torch.allclose(summands.sum(0), distillation.top_k_reverse_kl(student, logprobs, ids))
    own = student.log_softmax(-1).gather(-1, ids)
    assert distillation.top_k_reverse_kl(student, own, ids).abs().max() < 1e-12
    assert ((own.exp() * (own - logprobs)).sum(-1) < 0).any()


def test_top_k_of_everything_is_the_reverse_kl():
    student, teacher = logits()
    everything = distillation.top_k_reverse_kl(student, *distillation.teacher_top_k(teacher, 7))
    full = distillation.reverse_kl(student, teacher)
    assert torch.allclose(everything, full)
    assert torch.allclose(gradient(everything, student), gradient(full, student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("divergence", WHOLE)
def test_vocabulary_padded_with_infinity(divergence, dtype):
    student, teacher = logits()
    student = student.detach().to(dtype).requires_grad_()
    teacher = teacher.to(dtype)
    padding = torch.full((5, 2), -INF, dtype=dtype)
    padded = divergence(torch.cat([student, padding], -1), torch.cat([teacher, padding], -1))
    plain = divergence(student, teacher)
    assert torch.allclose(padded, plain, atol=1e-6)
    assert torch.allclose(gradient(padded, student), gradient(plain, student), atol=1e-6)


@pytest.mark.parametrize("divergence", WHOLE)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_infinity_on_one_side_stays_finite(divergence, whose):
    student, teacher = logits()
    student = student.detach()
    (student if whose == "student" else teacher)[:, 0] = -INF
    student.requires_grad_()
    losses = divergence(student, teacher)
    assert losses.isfinite().all() and (losses > 0).all()
    assert gradient(losses, student).isfinite().all()


def expected_gradient(per_token_loss):
    """The gradient of E over v ~ p_S of per_token_loss(log p_S(v), log p_T(v)), by summing over the vocabulary."""
    student, teacher = logits(tokens=1)
    student_logprobs, teacher_logprobs = student.log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    losses = per_token_loss(student_logprobs, teacher_logprobs)
    return gradient(student_logprobs.detach().exp() * losses, student), student, teacher


def test_the_mean_gradient_of_a_sampled_token_is_that_of_the_reverse_kl():
    policy, student, teacher = expected_gradient(
        lambda own, teacher: -teacher_advantages(teacher, own, limit=math.inf) * own
    )
    assert torch.allclose(policy, gradient(distillation.reverse_kl(student, teacher), student))
