"""Contract of every algorithm, and the checks of their settings.

It covers each file in openmimo/rl/algorithms without being listed.
"""

import dataclasses
import subprocess
import sys

import pytest
import torch

from openmimo.core.config import from_dict, to_dict
from openmimo.core.errors import ConfigError
from openmimo.core.samples import Sample
from openmimo.rl.algorithm import ALGORITHMS, CORRECTION_LIMITS, Correction, open_algorithm
from openmimo.rl.algorithms._correction import correction_weights
from openmimo.rl.losses.tokens import TokenBatch

NAN = float("nan")
NAMES = ALGORITHMS.names()
OUTCOME_NAMES = [name for name in NAMES if not ALGORITHMS.get(name).uses_teacher]


def make_sample(mask, *, reward=0.0, group="g", domain="d", finish_reason="stop", gap=0.5):
    """Tokens with mask 1 are the policy's; the teacher's log-probability of each is higher by `gap`."""
    logprobs = [-1.0 - 0.1 * i if written else 0.0 for i, written in enumerate(mask)]
    return Sample(
        token_ids=list(range(len(mask))),
        loss_mask=[bool(written) for written in mask],
        logprobs=logprobs,
        versions=[0 if written else -1 for written in mask],
        domain=domain,
        group=group,
        reward=reward,
        finish_reason=finish_reason,
        teacher_logprobs=[value + gap for value in logprobs],
    )


def annotate(name, samples, **options):
    algorithm, options = open_algorithm(name, options)
    algorithm.annotate(samples, options, [list(sample.logprobs) for sample in samples])
    return samples


def make_step():
    """Two groups of two samples, with prompts, a tool's turn in the middle, and different lengths."""
    return [
        make_sample([0, 1, 1, 0, 0, 1], reward=1.0, group="a"),
        make_sample([0, 1], reward=0.0, group="a"),
        make_sample([0, 0, 1, 1], reward=0.5, group="b", domain="e"),
        make_sample([0, 0, 1, 1, 1], reward=1.0, group="b", domain="e"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_only_what_the_policy_wrote_counts(name):
    samples = annotate(name, make_step())
    for sample in samples:
        assert len(sample.advantages) == len(sample.weights) == len(sample.token_ids)
        for written, advantage, weight in zip(sample.loss_mask, sample.advantages, sample.weights, strict=True):
            assert (weight > 0) == written
            assert (advantage != 0) == written
    # tokens of tools change no mean: without them, the other samples get the same values
    shorter = make_step()
    shorter[0] = make_sample([0, 1, 1, 1], reward=1.0, group="a")
    shorter = annotate(name, shorter)
    for ours, theirs in zip(samples[1:], shorter[1:], strict=True):
        assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_failed_and_empty_samples_count_nowhere(name):
    failed = [make_sample([0, 1, 1], reward=NAN, group="a", finish_reason="error"), make_sample([0, 0], group="b")]
    with_failures = annotate(name, [failed[0], *make_step(), failed[1]])
    without = annotate(name, make_step())
    for ours, theirs in zip(with_failures[1:-1], without, strict=True):
        assert ours == theirs
    for sample in failed:
        assert set(sample.advantages) == set(sample.weights) == {0.0}
        assert len(sample.weights) == len(sample.token_ids)
    annotate(name, failed)
    annotate(name, [])


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_per_token_and_push_the_right_way(name):
    algorithm, options = open_algorithm(name, {})
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -0.7], requires_grad=True)
    old = logprobs.detach()
    advantages = torch.tensor([1.0, 0.5, -1.0, 0.0])
    sequence, staleness = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64)
    losses = algorithm.token_losses(TokenBatch(logprobs, old, old, advantages, sequence, staleness, 2), options)
    assert losses.shape == (4,)
    losses.sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)  # on policy, every algorithm is REINFORCE
    assert torch.equal(logprobs.grad.sign(), -advantages.sign())


@pytest.mark.parametrize("name", NAMES)
def test_options_are_plain_and_checked(name):
    algorithm = ALGORITHMS.get(name)
    assert algorithm.describe
    options = algorithm.options()
    assert from_dict(algorithm.options, to_dict(options)) == options
    assert dataclasses.fields(options)
    with pytest.raises(ConfigError, match="did you mean 'correction'"):
        open_algorithm(name, {"corection": {}})


def test_settings_need_no_torch():
    code = "import sys, openmimo.rl.algorithm; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", OUTCOME_NAMES)
def test_missing_rewards_are_refused(name):
    with pytest.raises(ValueError, match="Score every sample"):
        annotate(name, [make_sample([0, 1], reward=NAN)])


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        ({"kind": "tis", "low": 0.5}, "correction.low has no effect"),
        ({"kind": "none", "high": 0.5}, "correction.high has no effect"),
        ({"kind": "icepop", "decay": 0.5}, "correction.decay has no effect"),
        ({"kind": "icepop", "low": 3.0}, "low < high"),
        ({"kind": "staleness_tis", "decay": 1.5}, "decay from 0 to 1"),
        ({"kind": "ice"}, "must be one of"),
    ],
)
def test_corrections_without_effect_or_sense_are_errors(correction, message):
    with pytest.raises(ConfigError, match=message):
        open_algorithm("grpo", {"correction": correction})


def test_other_settings_without_effect_or_sense_are_errors():
    with pytest.raises(ConfigError, match="multiply by it again"):
        open_algorithm("grpo", {"old_policy": "bypass"})
    open_algorithm("grpo", {"old_policy": "bypass", "correction": {"kind": "none"}})
    open_algorithm("grpo", {"old_policy": "bypass", "correction": {"kind": "sequence_mask", "veto_below": 1e-4}})
    with pytest.raises(ConfigError, match="no effect"):
        open_algorithm("grpo", {"max_answer_tokens": 8})
    with pytest.raises(ConfigError, match="above 1"):
        open_algorithm("grpo", {"dual_clip": 0.5})
    with pytest.raises(ConfigError, match="alpha"):
        open_algorithm("mopd", {"alpha": -1.0})


def engine_gap_batch(advantage=1.0):
    """π_θ / π_old is 1.1; π_old / μ is 1.5, 3 and 0.1. The last token is a second sequence, three versions old."""
    logprobs = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - torch.tensor(1.1, dtype=torch.float64).log()
    behavior = old - torch.tensor([1.5, 3.0, 0.1], dtype=torch.float64).log()
    advantages = torch.full((3,), advantage, dtype=torch.float64)
    return TokenBatch(logprobs, old, behavior, advantages, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 3]), 2)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ({"kind": "none"}, [1, 1, 1]),
        ({"kind": "none", "veto_below": 0.2}, [1, 1, 0]),
        ({"kind": "tis"}, [1.5, 2, 0.1]),
        ({"kind": "icepop"}, [1.5, 0, 0]),
        ({"kind": "clip"}, [1.5, 2, 0.5]),
        ({"kind": "sequence_mask", "low": 0.5, "high": 2.5}, [1, 1, 0]),
        ({"kind": "sequence_tis", "high": 4.0}, [4, 4, 0.1]),
        ({"kind": "staleness_tis"}, [1.5, 1.5, 0.1]),
        ({"kind": "staleness_tis", "max_staleness": 2}, [1.5, 1.5, 0]),
    ],
)
def test_grpo_multiplies_its_ratio_by_the_correction_of_the_engines_gap(correction, expected):
    algorithm, options = open_algorithm("grpo", {"correction": correction})
    batch = engine_gap_batch()
    losses = algorithm.token_losses(batch, options)
    assert losses.tolist() == pytest.approx([-1.1 * weight for weight in expected])
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logprobs_N)
    assert gradient.tolist() == pytest.approx([-1.1 * weight for weight in expected])
    assert not correction_weights(batch, batch.logprobs_N, options.correction).requires_grad


def test_every_kind_of_correction_is_tested_above():
    kinds = {"none", "tis", "icepop", "clip", "sequence_mask", "sequence_tis", "staleness_tis"}
    assert kinds == set(CORRECTION_LIMITS)
    assert all(Correction(kind).limits() == limits for kind, limits in CORRECTION_LIMITS.items())


def test_bypass_takes_the_engine_as_the_old_policy():
    options = {"old_policy": "bypass", "correction": {"kind": "none"}, "high": 9.0, "low": 1.0}
    algorithm, options = open_algorithm("grpo", options)
    assert algorithm.token_losses(engine_gap_batch(), options).tolist() == pytest.approx([-1.65, -3.3, -0.11])


@pytest.mark.parametrize("name", ["mopd", "rloo"])
def test_without_a_ratio_the_correction_goes_all_the_way(name):
    algorithm, options = open_algorithm(name, {"correction": {"kind": "icepop"}})
    batch = engine_gap_batch()
    (gradient,) = torch.autograd.grad(algorithm.token_losses(batch, options).sum(), batch.logprobs_N)
    assert gradient.tolist() == pytest.approx([-1.65, 0.0, 0.0])  # π_θ / μ; outside the gate the gradient is 0


def test_grpo_weighs_tokens_alike_and_mopd_answers():
    grpo, mopd = annotate("grpo", make_step()), annotate("mopd", make_step(), balance_domains=False)
    assert {weight for sample in grpo for weight in sample.weights} == {0.0, 1 / 9}
    for sample in mopd:
        assert sum(sample.weights) == pytest.approx(1 / 4)
    for samples in (grpo, mopd, annotate("mopd", make_step())):
        assert sum(weight for sample in samples for weight in sample.weights) == pytest.approx(1.0)


def test_constant_weights_divide_by_the_longest_answer_or_the_given_length():
    assert max(annotate("dr_grpo", make_step())[1].weights) == pytest.approx(1 / (4 * 3))
    assert max(annotate("dr_grpo", make_step(), max_answer_tokens=10)[1].weights) == pytest.approx(1 / (4 * 10))


def test_mopd_balances_domains():
    """Three long answers of one domain and one short answer of another: by default each domain has half of the
    gradient.
    """
    samples = [make_sample([0] + [1] * 40, domain="long") for _ in range(3)] + [make_sample([0, 1], domain="short")]

    def share(**options):
        return sum(sum(sample.weights) for sample in annotate("mopd", samples, **options)[:3])

    assert share() == pytest.approx(0.5)
    assert share(balance_domains=False) == pytest.approx(0.75)
    annotate("grpo", samples)
    assert sum(sum(sample.weights) for sample in samples[:3]) == pytest.approx(120 / 121)


def test_mopd_never_whitens():
    """If the teacher prefers every token, all advantages are positive; twice the gap gives twice the advantage."""
    for gap in (0.5, 1.0):
        for sample in annotate("mopd", [make_sample([0, 1, 1], gap=gap), make_sample([0, 1], gap=gap)]):
            assert sample.advantages[1:] == pytest.approx([gap] * (len(sample.token_ids) - 1))
    (sample,) = annotate("mopd", [make_sample([0, 1], gap=9.0)])
    assert sample.advantages.tolist() == [0.0, 5.0]


def test_mopd_scales_domains_if_asked():
    def step():
        calm, wild = make_sample([0, 1, 1], domain="calm"), make_sample([0, 1, 1], domain="wild")
        calm.teacher_logprobs = [calm.logprobs[i] + gap for i, gap in enumerate((0.0, 0.1, -0.1))]
        wild.teacher_logprobs = [wild.logprobs[i] + gap for i, gap in enumerate((0.0, 2.0, -2.0))]
        return [calm, wild]

    calm, wild = annotate("mopd", step(), scale_domains=True)
    assert calm.advantages[1:] == pytest.approx([0.4, -0.4])
    assert wild.advantages[1:] == pytest.approx([2 * (2.005 / 4) ** 0.5, -2 * (2.005 / 4) ** 0.5])


def test_mopd_without_a_teachers_reply():
    missing, given = make_sample([0, 1], reward=1.0, domain="x"), make_sample([0, 1], reward=0.0)
    missing.teacher_logprobs = [NAN, NAN]
    annotate("mopd", [missing, given])
    assert missing.advantages.tolist() == [0.0, 0.0]
    assert given.advantages == pytest.approx([0.0, 0.5])
    annotate("mopd", [missing, given], alpha=0.5)  # the outcome reward is still known
    assert missing.advantages == pytest.approx([0.0, 0.5], abs=1e-5)
    assert given.advantages == pytest.approx([0.0, 0.0], abs=1e-5)


def test_mopd_needs_rewards_for_alpha_only():
    annotate("mopd", [make_sample([0, 1], reward=NAN)])
    with pytest.raises(ValueError, match="Score every sample"):
        annotate("mopd", [make_sample([0, 1], reward=NAN)], alpha=0.1)


@pytest.mark.parametrize("name", ["teacher", "policy"])
@pytest.mark.parametrize("cut", [slice(1, None), slice(None, -1), slice(0, 0)])
def test_scores_that_are_not_aligned_with_the_tokens_are_refused(name, cut):
    """A list that is shifted by one (no prompt, or no last token) would score each token by its neighbor."""
    sample = make_sample([0, 1, 1])
    policy = list(sample.logprobs)
    if name == "teacher":
        sample.teacher_logprobs = sample.teacher_logprobs[cut]
    else:
        policy = policy[cut]
    algorithm, options = open_algorithm("mopd", {})
    with pytest.raises(ValueError, match=f"{name} log-probabilities"):
        algorithm.annotate([sample], options, [policy])


def test_mopd_refuses_a_skipped_forward_pass():
    algorithm, options = open_algorithm("mopd", {})
    with pytest.raises(ValueError, match="not computed"):
        algorithm.annotate([make_sample([0, 1, 1])], options, [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize("name", OUTCOME_NAMES)
def test_an_episode_counts_once_in_its_group_in_however_many_contexts(name):
    rewards = (1.0, 0.0, 0.0)
    whole = annotate(name, [make_sample([0, 1, 1], reward=reward) for reward in rewards])
    contexts = [make_sample([0, 1], reward=1.0) for _ in range(3)] + [make_sample([0, 1, 1], reward=0.0) for _ in "ab"]
    for context in contexts[:3]:
        context.episode = "g/0"
    annotate(name, contexts)
    assert [context.advantages[1] for context in contexts[:3]] == pytest.approx([whole[0].advantages[1]] * 3)
    assert [context.advantages[1] for context in contexts[3:]] == pytest.approx([whole[1].advantages[1]] * 2)
    annotate(name, contexts, normalization="sequence")
    totals = [sum(context.weights) for context in contexts]
    assert [sum(totals[:3]), *totals[3:]] == pytest.approx([1 / 3] * 3)
