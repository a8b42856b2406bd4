"""Every router backend chooses the experts that the definition chooses in float64, or refuses."""

import pytest
import torch

from openmimo.kernels import native
from openmimo.kernels.operations import ROUTER, RouterNeed, RoutingRule, route

BACKENDS = dict(ROUTER.backends())
RULES = {
    "normalized": (9, RoutingRule(3)),
    "one expert, scaled": (8, RoutingRule(1, normalize_weights=False, routed_scale=2.5)),
    "groups": (12, RoutingRule(4, num_groups=4, groups_per_token=2)),
}
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 x, float32 weight": (torch.bfloat16, torch.float32),
}
TOKENS = 32


def inside_poison(tensor):
    """Copies the numbers between NaNs, so that a read out of bounds makes the comparison fail."""
    around = torch.full((tensor.numel() + 128,), float("nan"), dtype=tensor.dtype)
    return around[64:-64].view(tensor.shape).copy_(tensor)


def call_of(num_experts, dtypes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, 40, generator=generator).to(dtypes[0])
    weight, bias = (torch.randn(size, generator=generator).to(dtypes[1]) for size in ((num_experts, 40), num_experts))
    return [inside_poison(tensor) for tensor in (x, 0.2 * weight, 0.3 * bias)]


def need_of(call, rule, *, replayed=False, keep_scores=False, gradients=False):
    x, weight, _ = call
    return RouterNeed(len(x), x.dtype, weight.dtype, rule.num_groups > 1, replayed, keep_scores, gradients, True, True)


def exact_route(call, rule):
    """Routes token by token in float64. Returns ids (best first), weights and scores."""
    x, weight, bias = (tensor.double() for tensor in call)
    scores = (x @ weight.T).sigmoid()
    ids = []
    for row in (scores + bias).unbind():
        groups = row.view(rule.num_groups, -1)
        best = groups.topk(2, dim=1).values.sum(1).topk(rule.groups_per_token).indices if rule.num_groups > 1 else [0]
        size = groups.shape[1]
        allowed = [int(group) * size + i for group in best for i in range(size)]
        ids.append(sorted(allowed, key=lambda expert, row=row: -row[expert].item())[: rule.experts_per_token])
    ids = torch.tensor(ids)
    weights = scores.gather(1, ids)
    if rule.normalize_weights:
        weights = weights / weights.sum(1, keepdim=True)
    return ids, weights * rule.routed_scale, scores


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_backend_chooses_as_float64_does_or_refuses(name, rule, dtypes):
    num_experts, rule = RULES[rule]
    call = call_of(num_experts, DTYPES[dtypes])
    if reason := BACKENDS[name].refuse(need_of(call, rule)):
        pytest.skip(reason)
    ids, weights, scores = BACKENDS[name].run(*call, rule, None, False)
    exact_ids, exact_weights, _ = exact_route(call, rule)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, exact_ids)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.double(), exact_weights, rtol=1e-5)
    assert scores is None


@pytest.mark.parametrize("name", BACKENDS)
def test_given_choices_and_kept_scores(name):
    num_experts, rule = RULES["normalized"]
    call = call_of(num_experts, DTYPES["float32"])
    if reason := BACKENDS[name].refuse(need_of(call, rule, replayed=True, keep_scores=True, gradients=True)):
        pytest.skip(reason)
    exact_ids, _, exact_scores = exact_route(call, rule)
    given = torch.full((TOKENS, 3), -1, dtype=torch.int16)
    given[4] = torch.tensor([8, 0, 3])
    weight = call[1].requires_grad_()
    ids, weights, scores = BACKENDS[name].run(call[0], weight, call[2], rule, given, True)
    assert ids[4].tolist() == [8, 0, 3]
    assert torch.equal(ids[5:], exact_ids[5:])
    assert torch.allclose(scores.double(), exact_scores, rtol=1e-5)
    chosen = exact_scores[4, [8, 0, 3]]
    assert torch.allclose(weights[4].double(), chosen / chosen.sum(), rtol=1e-5)
    (gradient,) = torch.autograd.grad((weights * torch.arange(3)).sum(), weight)
    assert gradient.abs().sum() > 0


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("dtypes", DTYPES)
@torch.inference_mode()
def test_a_token_has_the_same_bits_alone_and_in_a_batch(dtypes):
    num_experts, rule = RULES["normalized"]
    x, weight, bias = call_of(num_experts, DTYPES[dtypes])
    assert ROUTER.choose(need_of((x, weight, bias), rule))[0] == "native"
    ids, weights, _ = route(x, weight, bias, rule)
    alone = [route(row[None], weight, bias, rule) for row in x]
    assert torch.equal(ids, torch.cat([one[0] for one in alone]))
    assert torch.equal(weights, torch.cat([one[1] for one in alone]))


@torch.inference_mode()
def test_strided_tensors_and_many_tokens():
    num_experts, rule = RULES["normalized"]
    x, weight, bias = call_of(num_experts, DTYPES["float32"])
    exact_ids, _, _ = exact_route((x, weight, bias), rule)
    strided = torch.stack([x, x], dim=2).flatten(1)[:, ::2], weight.T.contiguous().T
    assert torch.equal(route(*strided, bias, rule)[0], exact_ids)
    assert torch.equal(route(x.repeat(3, 1), weight, bias, rule)[0], exact_ids.repeat(3, 1))
