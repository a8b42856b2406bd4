"""Kernels of training on an accelerator: experts and losses with gradients, and a step that waits for nothing.

`pytest -m gpu` runs these tests on a machine with an accelerator. Here backends that are not chosen by themselves are
called by name.
"""

import pytest
import torch
from conftest import tiny_model

from openmimo.kernels.operations import EXPERTS, TOKEN_LOSS, ExpertsNeed, TokenLossNeed
from openmimo.model.context import PackedContext
from openmimo.model.heads import micro_batch
from openmimo.runtime.device import resolve_device
from openmimo.train.config import OptimizerConfig
from openmimo.train.loss import training_loss
from openmimo.train.optim import StepGuard, build_optimizer, clip_gradients, step_unless

pytestmark = pytest.mark.gpu
EXPERT_BACKENDS, LOSS_BACKENDS = dict(EXPERTS.backends()), dict(TOKEN_LOSS.backends())


@pytest.fixture(scope="module")
def device():
    found = resolve_device("auto")
    if found.type == "cpu":
        pytest.skip("no accelerator")
    return found


@pytest.fixture
def waiting_is_an_error(device):
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def relative(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(
    "tokens, experts, active, model_dim, expert_dim, chosen",
    [(500, 16, 4, 64, 32, 16), (3000, 48, 6, 200, 72, 48), (700, 32, 2, 2056, 1032, 5), (1, 8, 8, 64, 64, 8)],
)
def test_experts_in_training(device, waiting_is_an_error, tokens, experts, active, model_dim, expert_dim, chosen):
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.rand(tokens, chosen, device=device, generator=generator).topk(active).indices
    ids[0, -1] = ids[0, 0]  # an expert twice

    def draw(*shape, scale=1.0, dtype=torch.bfloat16):
        return (scale * torch.randn(*shape, device=device, generator=generator)).to(dtype).requires_grad_()

    x, weights = draw(tokens, model_dim), draw(tokens, active, dtype=torch.float32)
    gate_up = draw(experts, 2 * expert_dim, model_dim, scale=model_dim**-0.5)
    down = draw(experts, model_dim, expert_dim, scale=expert_dim**-0.5)
    need = ExpertsNeed(tokens, experts, active, model_dim, expert_dim, torch.bfloat16, True, False)
    backend, inputs = EXPERT_BACKENDS["triton_training"], (x, weights, gate_up, down)
    assert backend.refuse(need) is None
    upstream = torch.randn(tokens, model_dim, device=device, generator=generator).bfloat16()

    def results():
        out = backend.run(x, ids, weights, gate_up, down, need=need)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    first = results()
    waiting_is_an_error()
    second = results()
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True)), "not deterministic"
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = EXPERT_BACKENDS["reference"].run(wide[0], ids, *wide[1:], need=need._replace(dtype=torch.float64))
    exact = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    assert [relative(ours, theirs) < 1e-2 for ours, theirs in zip(first, exact, strict=True)] == [True] * 5
    unused = torch.ones(experts, dtype=torch.bool, device=device)
    unused[ids.unique()] = False
    assert first[3][unused].eq(0).all() and first[4][unused].eq(0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tokens, model_dim, vocabulary", [(700, 64, 1000), (5000, 256, 15_001), (1, 64, 7)])
def test_token_losses(device, waiting_is_an_error, tokens, model_dim, vocabulary, temperature):
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, model_dim, device=device, generator=generator).bfloat16().requires_grad_()
    weight = (0.2 * torch.randn(vocabulary, model_dim, device=device, generator=generator)).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
    weights = torch.rand(tokens, device=device, generator=generator)
    ours, theirs = (LOSS_BACKENDS[name].run for name in ("triton", "reference"))
    assert LOSS_BACKENDS["triton"].refuse(TokenLossNeed(torch.bfloat16, False)) is None
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight.bfloat16())]
    exact = theirs.logprobs(*wide, labels, temperature)
    for kind in ("logprobs", "joined"):
        if kind == "joined" and temperature != 1.0:
            continue
        for mode in ("default", "error"):  # the second time, nothing is compiled
            torch.cuda.set_sync_debug_mode(mode)
            if kind == "logprobs":
                logprobs = ours.logprobs(hidden, weight.bfloat16(), labels, temperature)
                loss = -(logprobs * weights).sum()
            else:
                loss, logprobs = ours.joined(hidden, weight, labels, weights)
            gradients = torch.autograd.grad(-2.0 * loss, (hidden, weight))
        torch.cuda.set_sync_debug_mode("default")
        assert relative(logprobs, exact) < 5e-3
        expected = torch.autograd.grad(2.0 * (exact * weights.double()).sum(), wide, retain_graph=True)
        assert [relative(*pair) < 1e-2 for pair in zip(gradients, expected, strict=True)] == [True, True]
        assert gradients[1].dtype == torch.float32


def test_a_step_waits_for_nothing_and_is_that_of_other_backends(device, monkeypatch, waiting_is_an_error):
    """The kernels of this page in a model, against those that are chosen by themselves."""
    lengths = (200, 1, 95)
    tokens = torch.randint(0, 160, (sum(lengths),), generator=torch.Generator().manual_seed(0))

    def step():
        torch.manual_seed(0)
        model = tiny_model(mtp_heads=2).to(device)
        model.compute_dtype = torch.bfloat16
        optimizer, guard = build_optimizer(model, OptimizerConfig()), StepGuard(model)
        results = []
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            batch = micro_batch(tokens, lengths, None, 2).to(device)
            context = PackedContext(lengths, device=device, balance_weight=1e-3, balance_length=148)
            loss, _ = training_loss(model, batch, context, label_counts=batch.label_counts(), mtp_weight=0.3)
            loss.backward()
            gradients = clip_gradients(model, 1.0)
            step_unless(optimizer, guard.defer(loss, gradients, "the step"))
            torch.cuda.set_sync_debug_mode("default")
            assert guard.settle()
            results = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
            model.zero_grad(set_to_none=True)
        return results

    theirs = step()
    backends = (EXPERTS, "triton_training", EXPERT_BACKENDS), (TOKEN_LOSS, "triton", LOSS_BACKENDS)
    for dispatcher, name, found in backends:
        monkeypatch.setattr(dispatcher, "choose", lambda need, name=name, found=found: (name, found[name]))
    ours, theirs = (torch.cat([tensor.flatten() for tensor in found]) for found in (step(), theirs))
    assert relative(ours, theirs) < 3e-2
