"""Advantages and weights: values by hand, and known mistakes of other implementations."""

import math

import pytest
import torch

from openmimo.rl.losses import normalize as normalize
from openmimo.rl.losses.advantages import (
    dr_grpo_advantages,
    grpo_advantages,
    mopd_advantages,
    rloo_advantages,
    teacher_advantages,
)

NAN, INF = float("nan"), float("inf")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def assert_close(ours, *expected):
    assert ours.tolist() == pytest.approx(list(expected), abs=1e-5)


def test_group_advantages_by_hand():
    # groups are interleaved: {1, 0, 0} and {0.25, 0.75}
    rewards, groups = tensor(1, 0.25, 0, 0.75, 0), torch.tensor([0, 1, 0, 1, 0])
    third = 1 / 3
    std = math.sqrt(2) / 3
    assert_close(dr_grpo_advantages(rewards, groups), 2 * third, -0.25, -third, 0.25, -third)
    assert_close(grpo_advantages(rewards, groups), 2 * third / std, -1, -third / std, 1, -third / std)
    assert_close(rloo_advantages(rewards, groups), 1, -0.5, -0.5, 0.5, -0.5)


@pytest.mark.parametrize("advantages", [grpo_advantages, dr_grpo_advantages, rloo_advantages])
def test_constant_groups_and_only_answers_teach_nothing(advantages):
    # the mean of seven 0.1 is not 0.1 in floating point, and division by a tiny std would amplify the difference
    rewards = tensor(*[0.1] * 7, 0, 0, 1)
    groups = torch.tensor([0] * 7 + [1, 1, 2])
    assert (advantages(rewards, groups) == 0).all()


def test_teacher_advantages_keep_scale_and_sign():
    """Whitening would fail each of these assertions."""
    policy = tensor(-1.0, -2.0, -0.5)
    gap = tensor(0.5, 1.0, 2.0)
    advantages = teacher_advantages(policy + gap, policy, limit=5.0)
    assert_close(advantages, 0.5, 1.0, 2.0)  # the teacher prefers all tokens: no advantage is negative
    assert_close(teacher_advantages(policy + 2 * gap, policy, limit=5.0), *(2 * advantages).tolist())
    assert_close(teacher_advantages(policy + gap[:1], policy, limit=5.0), 0.5, 0.5, 0.5)  # equal gaps still count


def test_teacher_advantages_are_clipped_and_detached():
    policy = tensor(-1.0, -30.0, -1.0).requires_grad_()
    advantages = teacher_advantages(tensor(-9.0, -1.0, -INF), policy, limit=5.0)
    assert_close(advantages, -5.0, 5.0, -5.0)
    assert not advantages.requires_grad


def test_a_missing_teacher_is_no_advantage():
    policy = tensor(-1.0, -2.0)
    assert_close(teacher_advantages(tensor(NAN, -1.5), policy, limit=5.0), 0.0, 0.5)
    # zeros in place of a missing reply would mean that the teacher is certain of the token
    assert (teacher_advantages(tensor(0.0, -1.5), policy, limit=5.0) != tensor(0.0, 0.5)).any()


def test_policy_logprobs_that_were_never_computed_are_refused():
    with pytest.raises(ValueError, match="not computed"):
        teacher_advantages(tensor(-1.0, -2.0), tensor(0.0, 0.0), limit=5.0)
    with pytest.raises(ValueError, match="NaN"):
        teacher_advantages(tensor(-1.0, -2.0), tensor(-1.0, NAN), limit=5.0)
    teacher_advantages(tensor(-1.0, -2.0), tensor(0.0, -1e-3), limit=5.0)  # one certain token is allowed
    assert len(teacher_advantages(tensor(), tensor(), limit=5.0)) == 0


def test_teacher_and_policy_must_score_the_same_tokens():
    with pytest.raises(ValueError, match="same tokens"):
        teacher_advantages(tensor(-1.0), tensor(-1.0, -2.0), limit=5.0)


def test_outcome_is_added_after_the_clip():
    assert_close(mopd_advantages(tensor(5.0, 0.0), tensor(2.0, -1.0), alpha=0.5), 6.0, -0.5)


def test_weights_by_hand():
    lengths = torch.tensor([1, 3])
    assert_close(normalize.token_weights(lengths), *[0.25] * 4)
    assert_close(normalize.sequence_weights(lengths), 1 / 2, 1 / 6, 1 / 6, 1 / 6)
    assert_close(normalize.constant_weights(lengths, max_length=5), *[0.1] * 4)


def test_long_answers_own_the_gradient_unless_domains_are_balanced():
    # two answers of domain 0 with 2 tokens each, one of domain 1 with 96
    lengths, domains = torch.tensor([2, 96, 2]), torch.tensor([0, 1, 0])
    of_domain_1 = domains.repeat_interleave(lengths) == 1
    token = normalize.token_weights(lengths)
    sequence = normalize.sequence_weights(lengths)
    assert token[of_domain_1].sum() == pytest.approx(0.96)
    assert sequence[of_domain_1].sum() == pytest.approx(1 / 3)
    for weights in (token, sequence, normalize.constant_weights(lengths, max_length=100)):
        balanced = normalize.balance_domains(weights, lengths, domains)
        assert balanced[of_domain_1].sum() == pytest.approx(float(weights.sum()) / 2)
        assert balanced.sum() == pytest.approx(float(weights.sum()))
    # proportions within a domain do not change
    assert_close(normalize.balance_domains(sequence, lengths, domains)[:2], 0.125, 0.125)


def test_domain_scales_by_hand():
    gaps = tensor(1.0, -1.0, 3.0, -3.0, 2.0, 2.0, NAN)
    domains = torch.tensor([0, 0, 1, 1, 2, 2, 1])
    overall = gaps[:6].std(correction=0).item()
    expected = [overall / 1, overall / 1, overall / 3, overall / 3, 1, 1, overall / 3]
    assert_close(normalize.domain_scales(gaps, domains), *expected)
    extreme = tensor(0.01, -0.01, 50.0, -50.0)
    assert_close(normalize.domain_scales(extreme, torch.tensor([0, 0, 1, 1])), 4.0, 4.0, 2**-0.5, 2**-0.5)
    assert (normalize.domain_scales(tensor(NAN, NAN), torch.tensor([0, 1])) == 1).all()
