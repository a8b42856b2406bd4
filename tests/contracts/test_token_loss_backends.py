"""Every backend of the token losses against torch's cross-entropy over all logits; the chosen one never holds these."""

import pytest
import torch
import torch.nn.functional as F

from openmimo.kernels.operations import (
    TOKEN_LOSS,
    TokenLossNeed,
    kept_rows,
    token_argmax,
    token_logprobs,
    token_loss,
)
from openmimo.kernels.token_loss import tiled, triton

BACKENDS = dict(TOKEN_LOSS.backends())


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles far smaller than the inputs, so that every seam is crossed."""
    monkeypatch.setattr(tiled, "TILE_TOKENS", 16)
    monkeypatch.setattr(tiled, "TILE_VOCABULARY", 32)
    monkeypatch.setattr(tiled, "MAX_TILE_LOGITS", 16 * 32)
    monkeypatch.setattr(triton, "TILE_TOKENS", 16)
    monkeypatch.setattr(triton, "TILE_MULTIPLE", 4)


def inputs(dtype=torch.float64, tokens=53, vocabulary=101):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::5] = -1
    return hidden, weight, labels


def functions_of(name, dtype):
    if reason := BACKENDS[name].refuse(TokenLossNeed(dtype, True)):
        pytest.skip(reason)
    return BACKENDS[name].run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", BACKENDS)
def test_logprobs_and_their_gradients(name, temperature):
    hidden, weight, labels = inputs()
    ours = functions_of(name, hidden.dtype).logprobs(hidden, weight, labels, temperature)
    expected = -F.cross_entropy(hidden @ weight.T / temperature, labels, ignore_index=-1, reduction="none")
    assert torch.allclose(ours, expected, atol=1e-12)
    assert (ours[::5] == 0).all()
    upstream = torch.cos(torch.arange(53, dtype=torch.float64))
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_temperature_for_each_token(name):
    hidden, weight, labels = inputs()
    temperature = torch.linspace(0.5, 2.0, 53, dtype=torch.float64)
    ours = functions_of(name, hidden.dtype).logprobs(hidden, weight, labels, temperature)
    logits = hidden @ weight.T / temperature[:, None]
    expected = -F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.linspace(0.5, 2.0, 53)], ids=["1", "0.7", "each its own"])
@pytest.mark.parametrize("name", BACKENDS)
def test_logprobs_in_float32(name, temperature):
    hidden, weight, labels = inputs(torch.float32)
    functions, upstream = functions_of(name, torch.float32), torch.cos(torch.arange(53.0))
    ours = functions.logprobs(hidden, weight, labels, temperature)
    divisor = temperature[:, None].double() if isinstance(temperature, torch.Tensor) else temperature
    logits = hidden.double() @ weight.double().T / divisor
    exact = -F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    assert torch.allclose(ours.double(), exact, atol=1e-5)
    assert (ours[::5] == 0).all()
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight), upstream, retain_graph=True),
        torch.autograd.grad(exact, (hidden, weight), upstream.double()),
        strict=True,
    ):
        assert (a - b).norm() < 2e-6 * b.norm()
    assert functions.logprobs(hidden[:0], weight, labels[:0], 1.0).shape == (0,)


@pytest.mark.parametrize("factor", [1.0, -3.0])
@pytest.mark.parametrize("frozen", [None, 0, 1], ids=["all", "hidden is frozen", "weight is frozen"])
@pytest.mark.parametrize("name", BACKENDS)
def test_loss_in_float32(name, frozen, factor):
    hidden, weight, labels = inputs(torch.float32)
    trained = [tensor for at, tensor in enumerate((hidden, weight)) if at != frozen]
    if frozen is not None:
        (hidden, weight)[frozen].requires_grad_(False)
    functions, weights = functions_of(name, torch.float32), torch.rand(53)
    ours = functions.loss(*(hidden[labels >= 0], weight, labels[labels >= 0], weights[labels >= 0]))
    losses = F.cross_entropy(hidden.double() @ weight.double().T, labels, ignore_index=-1, reduction="none")
    exact = (losses * weights.double()).sum()
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(factor * ours, trained), torch.autograd.grad(factor * exact, trained), strict=True
    ):
        assert (a - b).norm() < 2e-6 * b.norm()
    nothing = functions.loss(hidden[:0], weight, labels[:0], weights[:0])
    assert nothing.item() == 0
    if weight.requires_grad:
        assert not torch.autograd.grad(nothing, weight)[0].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_joined_heads_are_their_losses_apart(name):
    joined = functions_of(name, torch.float32).joined
    if joined is None:
        pytest.skip("it computes heads one after another")
    hidden, weight, labels = inputs(torch.float32)
    hidden, labels, weights = kept_rows(hidden, labels, torch.rand(53), None)
    loss, logprobs = joined(hidden, weight.double(), labels, weights)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    assert torch.allclose(-logprobs.double(), exact, atol=1e-5)
    assert not logprobs.requires_grad
    assert loss.item() == pytest.approx((exact * weights).sum().item(), rel=1e-6)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


@pytest.mark.parametrize("kept", [53, 42, 1])
def test_a_known_number_of_rows_gives_the_same_rows(kept):
    hidden, _, labels = inputs()
    labels = torch.full_like(labels, -1)
    labels[torch.randperm(53, generator=torch.Generator().manual_seed(1))[:kept]] = 7
    known, counted = (kept_rows(hidden, labels, torch.ones(53), number) for number in (kept, None))
    assert len(known[1]) == kept
    assert all(torch.equal(*pair) for pair in zip(known, counted, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backends_loss_in_bfloat16(name):
    hidden, weight, labels = inputs(torch.bfloat16)
    kept = labels >= 0
    hidden, labels, weights = hidden[kept], labels[kept], torch.rand(int(kept.sum()))
    functions = functions_of(name, torch.bfloat16)
    loss = functions.loss(hidden, weight, labels, weights)
    losses = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    exact = (losses * weights.double()).sum()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    ours, theirs = (torch.autograd.grad(value, weight)[0] for value in (loss, exact))
    assert (ours.double() - theirs.double()).norm() / theirs.double().norm() < 2e-2
    close = (hidden.double() @ weight.double().T).max(dim=-1).values
    best = functions.argmax(hidden.detach(), weight.detach())
    chosen = (hidden.double() @ weight.double().T).gather(1, best[:, None]).squeeze(1)
    assert torch.allclose(chosen, close, rtol=2e-2)


def test_loss_and_its_gradients():
    hidden, weight, labels = inputs()
    weights = torch.rand(53)
    weights[3] = 0.0
    ours = 2.0 * token_loss(hidden, weight, labels, weights)
    losses = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-1, reduction="none")
    expected = 2.0 * (losses * weights.double()).sum()
    assert torch.allclose(ours.double(), expected, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-10)


def test_bfloat16_inputs_give_float32_losses():
    hidden, weight, labels = inputs(torch.bfloat16)
    loss = token_loss(hidden, weight, labels, torch.full((53,), 1 / 42))
    exact = F.cross_entropy(hidden.double() @ weight.double().T, labels, ignore_index=-1)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 2e-2
    gradient = torch.autograd.grad(loss, hidden)[0]
    expected = torch.autograd.grad(exact, hidden)[0]
    assert gradient.dtype == torch.bfloat16
    assert (gradient.double() - expected).norm() / expected.norm() < 2e-2


def test_nothing_to_predict_is_zero_and_has_zero_gradients():
    hidden, weight, _ = inputs()
    loss = token_loss(hidden, weight, torch.full((53,), -1), torch.ones(53))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_argmax():
    hidden, weight, _ = inputs()
    assert torch.equal(token_argmax(hidden, weight), (hidden @ weight.T).argmax(-1))


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    """Every tensor that torch operations return during loss and gradients is smaller than [T, vocabulary]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    hidden, weight, labels = inputs(torch.float32, tokens=200, vocabulary=400)
    with Watch():
        token_loss(hidden, weight, labels, torch.ones(200)).backward()
        token_logprobs(hidden, weight, labels).sum().backward()
    assert max(largest) <= 400 * 16
    assert max(largest) < 200 * 400 / 10
