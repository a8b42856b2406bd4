"""Expected gradients of the algorithms against exact ones, on a policy whose answers can be enumerated.

Vocabulary 3, answers of 3 tokens, one row of logits for each prefix; expectations are sums over all 27 answers.
"""

import itertools

import pytest
import torch

from openmimo.core.samples import Sample
from openmimo.rl.algorithm import Correction, open_algorithm
from openmimo.rl.losses import distillation
from openmimo.rl.losses.tokens import TokenBatch

VOCABULARY, LENGTH = 3, 3
ANSWERS = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
PREFIXES = [answer for length in range(LENGTH) for answer in itertools.product(range(VOCABULARY), repeat=length)]
ROWS = {prefix: row for row, prefix in enumerate(PREFIXES)}
VISITED = torch.tensor([[ROWS[answer[:position]] for position in range(LENGTH)] for answer in ANSWERS])
CHOSEN = torch.tensor(ANSWERS)
REWARDS = torch.tensor([float(sum(answer) % 2 == 0) for answer in ANSWERS], dtype=torch.float64)


def random_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64)


@pytest.fixture
def policy():
    return random_logits(0).requires_grad_()


@pytest.fixture
def teacher():
    return random_logits(1)


def token_logprobs(logits):
    """Returns [27, 3]: the log-probability of each token of each answer."""
    return logits.log_softmax(-1)[VISITED, CHOSEN]


def prefix_probabilities(logits):
    """Returns [13]: the probability of reaching each prefix."""
    steps = logits.detach().log_softmax(-1)
    return torch.stack(
        [sum((steps[ROWS[p[:i]], p[i]] for i in range(len(p))), start=steps.new_zeros(())).exp() for p in PREFIXES]
    )


def make_sample(index, *, logprobs, teacher_logprobs=None, group="", domain="", reward=float("nan")):
    """A sample with a prompt of one token and the given answer."""
    return Sample(
        token_ids=[0, *ANSWERS[index]],
        loss_mask=[False, True, True, True],
        logprobs=[0.0, *logprobs],
        versions=[-1, 0, 0, 0],
        group=group,
        domain=domain,
        reward=reward,
        finish_reason="stop",
        teacher_logprobs=[] if teacher_logprobs is None else [float("nan"), *teacher_logprobs],
    )


def expected_gradient(policy, name, options, indices, probabilities, *, teacher=None, groups=None):
    """Returns the gradient of the algorithm's loss, where sample i of the step is answer indices[i].

    The loss of a step weighs its samples equally, so each is multiplied by probabilities [samples] here.
    """
    algorithm, options = open_algorithm(name, options)
    logprobs = token_logprobs(policy)[indices]
    given = None if teacher is None else token_logprobs(teacher)[indices].tolist()
    samples = [
        make_sample(
            index,
            logprobs=logprobs[i].tolist(),
            teacher_logprobs=None if given is None else given[i],
            group="" if groups is None else str(groups[i]),
            reward=REWARDS[index].item(),
        )
        for i, index in enumerate(indices)
    ]
    algorithm.annotate(samples, options, [[0.0, *row] for row in logprobs.tolist()])
    losses = algorithm.token_losses(batch_of(samples, logprobs), options).reshape(len(samples), LENGTH)
    weights = torch.tensor([sample.weights[1:].tolist() for sample in samples], dtype=torch.float64)
    loss = (losses * weights * len(samples) * probabilities[:, None]).sum()
    return torch.autograd.grad(loss, policy)[0]


def batch_of(samples, logprobs):
    flat = logprobs.reshape(-1)
    return TokenBatch(
        flat,
        flat.detach(),
        torch.tensor([sample.logprobs[1:].tolist() for sample in samples], dtype=torch.float64).reshape(-1),
        torch.tensor([sample.advantages[1:].tolist() for sample in samples], dtype=torch.float64).reshape(-1),
        torch.arange(len(samples)).repeat_interleave(LENGTH),
        torch.zeros(len(flat), dtype=torch.int64),
        len(samples),
    )


def answer_probabilities(policy):
    return token_logprobs(policy).sum(-1).exp()


def test_mopd_lowers_the_reverse_kl_of_each_token(policy, teacher):
    """Covers the term without future tokens: the probabilities of the prefixes are constants."""
    ours = expected_gradient(
        policy, "mopd", {"advantage_limit": 1e9}, range(27), answer_probabilities(policy).detach(), teacher=teacher
    )
    per_prefix = distillation.reverse_kl(policy, teacher)
    exact = torch.autograd.grad((prefix_probabilities(policy) * per_prefix).sum() / LENGTH, policy)[0]
    assert torch.allclose(ours, exact, atol=1e-12)
    assert exact.abs().max() > 1e-2


def test_the_future_token_path_is_not_in_it(policy, teacher):
    gap = token_logprobs(policy) - token_logprobs(teacher)
    whole = torch.autograd.grad((answer_probabilities(policy) * gap.sum(-1)).sum() / LENGTH, policy)[0]
    ours = expected_gradient(
        policy, "mopd", {"advantage_limit": 1e9}, range(27), answer_probabilities(policy).detach(), teacher=teacher
    )
    assert not torch.allclose(ours, whole, atol=1e-3)
    # the last token has no future, so there the two agree
    last = [ROWS[prefix] for prefix in PREFIXES if len(prefix) == LENGTH - 1]
    assert torch.allclose(ours[last], whole[last], atol=1e-12)


def test_mopd_steps_lead_to_the_teacher(policy, teacher):
    for _ in range(300):
        gradient = expected_gradient(
            policy, "mopd", {}, range(27), answer_probabilities(policy).detach(), teacher=teacher
        )
        policy = (policy.detach() - 5.0 * gradient).requires_grad_()
    reached = prefix_probabilities(policy) * distillation.reverse_kl(policy, teacher).detach()
    before = prefix_probabilities(random_logits(0)) * distillation.reverse_kl(random_logits(0), teacher)
    assert reached.sum() < 0.01 * before.sum()


def pairs(policy):
    """Returns all pairs of answers, as groups of two, and for each sample the probability of its pair."""
    probabilities = answer_probabilities(policy).detach()
    couples = list(itertools.product(range(27), repeat=2))
    indices = [index for couple in couples for index in couple]
    weights = torch.stack([probabilities[a] * probabilities[b] for a, b in couples]).repeat_interleave(2)
    # expected_gradient scales by the number of samples; a step of one pair has two
    return indices, weights / 2, [number for number in range(len(couples)) for _ in range(2)]


def exact_policy_gradient(policy):
    return -torch.autograd.grad((answer_probabilities(policy) * REWARDS).sum(), policy)[0]


@pytest.mark.parametrize(("name", "factor"), [("rloo", 1.0), ("dr_grpo", 0.5), ("grpo", 1.0)])
def test_expected_gradient_is_that_of_the_expected_reward(policy, name, factor):
    """Exact for RLOO; a mean that includes the answer itself scales by (n - 1) / n; std of 0/1 pairs only scales."""
    options = {"normalization": "constant", "max_answer_tokens": 1}
    indices, weights, groups = pairs(policy)
    ours = expected_gradient(policy, name, options, indices, weights, groups=groups)
    exact = exact_policy_gradient(policy)
    assert torch.allclose(ours, factor * exact, atol=1e-6 if name == "grpo" else 1e-12)
    assert exact.abs().max() > 1e-2


def test_all_algorithms_agree_in_direction_where_they_should(policy):
    indices, weights, groups = pairs(policy)
    exact = exact_policy_gradient(policy)
    for name in ("grpo", "dr_grpo", "gspo", "cispo", "rloo"):
        ours = expected_gradient(policy, name, {}, indices, weights, groups=groups)
        cosine = torch.nn.functional.cosine_similarity(ours.reshape(-1), exact.reshape(-1), dim=0)
        assert cosine > 1 - 1e-9, name  # all answers have one length, so normalizations only scale


def test_mopd_with_outcomes_adds_the_policy_gradient(policy, teacher):
    indices, weights, groups = pairs(policy)
    options = {"advantage_limit": 1e9}

    def gradient(alpha):
        return expected_gradient(
            policy, "mopd", options | {"alpha": alpha}, indices, weights, teacher=teacher, groups=groups
        )

    added = gradient(0.3) - gradient(0.0)
    assert torch.allclose(added, 0.3 * exact_policy_gradient(policy) / LENGTH, atol=1e-6)


def test_importance_weights_undo_the_engines_gap(policy, teacher):
    """With samples of another policy, the raw ratio gives the gradient that samples of the policy itself would give.

    Token ratios correct the token and not the prefix, so this is exact for answers of one token.
    """
    algorithm, options = open_algorithm("mopd", {"correction": {"kind": "icepop", "low": 0.0, "high": 1e9}})
    engine = random_logits(2)[:1].log_softmax(-1)[0]
    own, given = policy[:1].log_softmax(-1)[0], teacher[:1].log_softmax(-1)[0]
    samples = [
        Sample([0, v], [False, True], [0.0, engine[v].item()], [-1, 0], teacher_logprobs=[0.0, given[v].item()])
        for v in range(VOCABULARY)
    ]
    algorithm.annotate(samples, options, [[0.0, value] for value in own.tolist()])
    batch = TokenBatch(
        own,
        own.detach(),
        engine,
        torch.tensor([sample.advantages[1] for sample in samples], dtype=torch.float64),
        torch.arange(VOCABULARY),
        torch.zeros(VOCABULARY, dtype=torch.int64),
        VOCABULARY,
    )
    ours = torch.autograd.grad((engine.exp() * algorithm.token_losses(batch, options)).sum(), policy)[0]
    exact = torch.autograd.grad(distillation.reverse_kl(policy[:1], teacher[:1]).sum(), policy)[0]
    assert torch.allclose(ours, exact, atol=1e-12)


def test_the_default_gate_of_mopd_is_that_of_the_paper():
    _, options = open_algorithm("mopd", {})
    assert options.correction == Correction("icepop", low=0.5, high=2.0)
