"""Policy losses, corrections and diagnostics, by hand: values and gradients."""

import math

import pytest
import torch

from openmimo.rl.losses import corrections, objectives
from openmimo.rl.losses import tokens as diagnostics
from openmimo.rl.losses.tokens import TokenBatch

NAN = float("nan")


def make_batch(ratios, advantages, *, lengths=None, engine_ratios=None, staleness=None):
    """A batch with π_θ / π_old = ratios and π_old / μ = engine_ratios (1 by default)."""
    lengths = lengths or [len(ratios)]
    logprobs = torch.linspace(-2.0, -0.5, len(ratios), dtype=torch.float64)
    old = logprobs - torch.tensor(ratios, dtype=torch.float64).log()
    behavior = old - torch.tensor(engine_ratios or [1.0] * len(ratios), dtype=torch.float64).log()
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return TokenBatch(
        logprobs.requires_grad_(),
        old,
        behavior,
        torch.tensor(advantages, dtype=torch.float64),
        sequence,
        torch.tensor(staleness or [0] * len(ratios)),
        len(lengths),
    )


def gradient(losses, batch):
    return torch.autograd.grad(losses.sum(), batch.logprobs_N)[0]


def assert_close(ours, *expected):
    assert ours.tolist() == pytest.approx(list(expected), abs=1e-9)


def test_batches_hold_tensors_of_one_length():
    batch = make_batch([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="old_logprobs_N"):
        TokenBatch(**vars(batch) | {"old_logprobs_N": batch.old_logprobs_N[:1]})


def test_clipped_by_hand():
    batch = make_batch([1.25, 1.3, 0.7, 1.3, 0.7, 4.0], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    losses = objectives.clipped(batch, low=0.2, high=0.28)
    assert_close(losses, -1.25, -1.28, -0.7, 1.3, 0.8, 4.0)
    # no gradient once the ratio has passed the clip in the direction of the advantage; 1.25 is not clipped
    assert_close(gradient(losses, batch), -1.25, 0.0, -0.7, 1.3, 0.0, 4.0)
    dual = objectives.clipped(batch, low=0.2, high=0.28, dual=3.0)
    assert_close(dual, -1.25, -1.28, -0.7, 1.3, 0.8, 3.0)
    assert_close(gradient(dual, batch), -1.25, 0.0, -0.7, 1.3, 0.0, 0.0)


def test_the_old_policy_is_the_trainers_or_the_engines():
    batch = make_batch([1.1], [1.0], engine_ratios=[1.05])
    assert_close(objectives.clipped(batch, low=0.2, high=0.28), -1.1)
    assert_close(objectives.clipped(batch, low=0.2, high=0.28, old_policy="bypass"), -1.1 * 1.05)
    assert_close(objectives.clipped(batch, low=0.2, high=0.1, old_policy="bypass"), -1.1)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ratios_that_overflow_give_finite_gradients(advantage):
    batch = make_batch([1.0], [advantage])
    far = TokenBatch(**vars(batch) | {"old_logprobs_N": batch.old_logprobs_N - 1000})
    assert gradient(objectives.clipped(far, low=0.2, high=0.28), far).isfinite().all()


def test_gspo_by_hand():
    # geometric means: sqrt(1.2 * 1.1) and (0.8 * 1.1 * 0.9)^(1/3)
    batch = make_batch([1.2, 1.1, 0.8, 1.1, 0.9], [1.0, 2.0, -1.0, -1.0, -1.0], lengths=[2, 3])
    first, second = math.sqrt(1.32), 0.792 ** (1 / 3)
    losses = objectives.gspo(batch, low=0.5, high=0.5)
    assert_close(losses, -first, -2 * first, second, second, second)
    assert_close(gradient(losses, batch), -first, -2 * first, second, second, second)
    clipped = objectives.gspo(batch, low=0.01, high=0.01)
    assert_close(clipped, -1.01, -2.02, 0.99, 0.99, 0.99)
    assert_close(gradient(clipped, batch), 0, 0, 0, 0, 0)


def test_gspo_averaged_over_tokens_is_the_sequence_loss():
    batch = make_batch([1.2, 0.7, 1.1], [1.5, 1.5, 1.5])
    ours = gradient(objectives.gspo(batch, low=0.5, high=0.5) / 3, batch)
    ratio = (batch.logprobs_N - batch.old_logprobs_N).mean().exp()
    assert torch.allclose(ours, gradient(-1.5 * ratio, batch))


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    batch = make_batch([1.1, 9.0, 9.0, 0.1], [1.0, 1.0, -2.0, 1.0])
    losses = objectives.cispo(batch, low_ratio=0.5, high_ratio=5.0)
    assert_close(gradient(losses, batch), -1.1, -5.0, 10.0, -0.5)
    assert torch.allclose(losses, torch.tensor([-1.1, -5.0, 10.0, -0.5]).double() * batch.logprobs_N)


def test_reinforce_takes_no_gradient_of_advantages():
    batch = make_batch([1.0, 1.0], [1.0, -2.0])
    own = TokenBatch(**vars(batch) | {"advantages_N": batch.advantages_N - batch.logprobs_N})
    assert torch.allclose(gradient(objectives.reinforce(own), own), -own.advantages_N.detach())


def test_corrections_by_hand():
    ratios = [0.4, 0.5, 1.0, 2.0, 3.0]
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    weights = {
        "truncated": corrections.truncated(log_ratio, high=2.0),
        "clipped": corrections.clipped(log_ratio, low=0.5, high=2.0),
        "masked": corrections.masked(log_ratio, low=0.49, high=2.01),
    }
    assert_close(weights["truncated"], 0.4, 0.5, 1.0, 2.0, 2.0)
    assert_close(weights["clipped"], 0.5, 0.5, 1.0, 2.0, 2.0)
    assert_close(weights["masked"], 0.0, 0.5, 1.0, 2.0, 0.0)
    assert not any(values.requires_grad for values in weights.values())


def test_the_gate_includes_its_ends():
    log_ratio = torch.tensor([0.0])
    assert_close(corrections.masked(log_ratio, low=1.0, high=2.0), 1.0)
    assert_close(corrections.masked(log_ratio, low=0.5, high=1.0), 1.0)


def test_sequence_corrections_by_hand():
    batch = make_batch([1.0] * 5, [1.0] * 5, lengths=[2, 3], engine_ratios=[4.0, 0.25, 2.0, 2.0, 2.0])
    log_ratio = batch.old_logprobs_N - batch.behavior_logprobs_N
    # geometric means 1 and 2, products 1 and 8
    assert_close(corrections.sequence_masked(log_ratio, batch, low=0.9, high=1.1), 1, 1, 0, 0, 0)
    assert_close(corrections.sequence_masked(log_ratio, batch, low=1.9, high=2.1), 0, 0, 1, 1, 1)
    assert_close(corrections.sequence_truncated(log_ratio, batch, high=5.0), 1, 1, 5, 5, 5)
    assert_close(corrections.sequence_truncated(log_ratio, batch, high=9.0), 1, 1, 8, 8, 8)


def test_one_impossible_token_vetoes_its_sequence():
    batch = make_batch([1.0] * 4, [1.0] * 4, lengths=[2, 2], engine_ratios=[1.0, 9e-5, 1.1e-4, 1.0])
    log_ratio = batch.old_logprobs_N - batch.behavior_logprobs_N
    assert_close(corrections.veto(log_ratio, batch, lowest=1e-4), 0, 0, 1, 1)


def test_staleness_lowers_the_limit():
    staleness = torch.arange(8)
    limits = corrections.staleness_limit(staleness, high=2.0, decay=0.5)
    assert_close(limits[:3], 2.0, 1.5, 1.25)
    assert (limits.diff() < 0).all() and (limits > 1).all()
    weights = corrections.staleness_truncated(
        torch.full((8,), 3.0).log(), staleness, high=2.0, decay=0.5, max_staleness=4
    )
    assert torch.equal(weights, torch.where(staleness <= 4, limits, 0.0))
    low = torch.tensor([0.1, 0.3]).log()
    ages = torch.zeros(2, dtype=torch.int64)
    kept = corrections.staleness_truncated(low, ages, high=2.0, decay=0.5, max_staleness=4, low=0.2)
    assert kept.tolist() == pytest.approx([0.0, 0.3])


def test_a_gate_drops_gradients_and_not_only_values():
    batch = make_batch([3.0, 1.0], [1.0, 1.0])
    weights = corrections.masked(batch.logprobs_N - batch.old_logprobs_N, low=0.5, high=2.0)
    losses = corrections.apply(objectives.reinforce(batch), weights)
    assert_close(losses.detach(), 0.0, 0.5)
    assert_close(gradient(losses, batch), 0.0, -1.0)


def test_a_dropped_loss_may_be_infinite():
    logprobs = torch.tensor([-math.inf, -1.0], requires_grad=True)
    losses = corrections.apply(-logprobs, torch.tensor([0.0, 2.0]))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2.0]
    assert logprobs.grad.tolist() == [0.0, -2.0]


def test_diagnostics_by_hand():
    batch = make_batch([1.0] * 4, [0.0] * 4, engine_ratios=[1.0, 3.0, 1 / 6, 12.0], staleness=[0, 0, 1, 3])
    metrics = diagnostics.batch_diagnostics(batch, low=0.5, high=5.0, entropy_N=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    logs = [0.0, math.log(3), -math.log(6), math.log(12)]
    assert metrics == pytest.approx(
        {
            "mismatch_k1": -sum(logs) / 4,
            "mismatch_k3": (1 + 3 + 1 / 6 + 12 - 4 - sum(logs)) / 4,
            "logprob_difference_mean": (math.log(3) + math.log(6) + math.log(12)) / 4,
            "logprob_difference_max": math.log(12),
            "extreme_ratio_share_2": 0.75,
            "extreme_ratio_share_5": 0.5,
            "extreme_ratio_share_10": 0.25,
            "gated_low_share": 0.25,
            "gated_high_share": 0.25,
            "staleness_mean": 1.0,
            "staleness_max": 3.0,
            "entropy": 2.5,
        }
    )
    assert all(type(value) is float for value in metrics.values())
    assert diagnostics.batch_diagnostics(make_batch([], [], lengths=[0])) == {}


def test_the_gap_is_seen_where_the_gate_drops_fewer_tokens():
    """With a fixed gate, fewer tokens can be dropped although trainer and engine differ more."""
    early = make_batch([1.0] * 4, [0.0] * 4, engine_ratios=[1.0, 1.0, 1.0, 2.1])
    late = make_batch([1.0] * 4, [0.0] * 4, engine_ratios=[1.9, 1.9, 0.55, 0.55])
    early, late = (diagnostics.batch_diagnostics(batch, low=0.5, high=2.0) for batch in (early, late))
    assert late["gated_high_share"] + late["gated_low_share"] < early["gated_high_share"] + early["gated_low_share"]
    assert late["logprob_difference_mean"] > early["logprob_difference_mean"]
    assert late["mismatch_k3"] > early["mismatch_k3"]


def test_top_k_overlap_by_hand():
    student = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    teacher = torch.tensor([[3.0, 4.0, 1.0, 2.0], [1.0, 4.0, 3.0, 2.0]])
    assert diagnostics.top_k_overlap(student, teacher, k=2) == 0.75
    assert diagnostics.top_k_overlap(student, student, k=2) == 1.0
