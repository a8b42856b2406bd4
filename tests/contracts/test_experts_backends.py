"""Every expert backend computes what `reference` computes, forward and backward, or refuses."""

import pytest
import torch

from openmimo.kernels.experts import DISPATCHER, ExpertsNeed, apply_experts

BACKENDS = [name for name, _ in DISPATCHER.backends() if name != "reference"]

# tokens, experts, active, model dim, expert dim, experts that are ever chosen
CALLS = {
    "training": (300, 8, 2, 16, 24, 8),
    "some experts idle": (200, 8, 2, 16, 8, 3),
    "one expert takes all": (150, 4, 1, 8, 16, 1),
    "decode": (1, 8, 2, 16, 8, 8),
    "many experts": (64, 32, 4, 8, 8, 32),
}


def tensors_of(call, dtype, gradients):
    T, E, A, D, F, chosen = call
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(T, chosen, generator=generator).argsort(dim=-1)[:, :A]

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(gradients)

    x, gate_up, down = draw(T, D), draw(E, 2 * F, D), draw(E, D, F)
    weights = torch.rand(T, A, generator=generator, dtype=torch.float64).requires_grad_(gradients)
    need = ExpertsNeed(T, E, A, D, F, dtype, gradients, True)
    return need, (x, ids, weights, gate_up, down)


def run(name, need, tensors):
    out = dict(DISPATCHER.backends())[name].run(*tensors, need=need)
    if not need.needs_gradients:
        return [out]
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    return [out, *torch.autograd.grad(out, inputs, weights)]


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "inference"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_is_the_reference_or_refuses(name, call, gradients):
    need, tensors = tensors_of(CALLS[call], torch.float64, gradients)
    reason = dict(DISPATCHER.backends())[name].refuse(need)
    if reason:
        pytest.skip(reason)
    for ours, theirs in zip(run(name, need, tensors), run("reference", need, tensors), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_tokens", [300, 2048])
@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_stays_close(name, num_tokens):
    """2,048 tokens are enough for the loop to pad each expert's rows."""
    call = (num_tokens, 8, 2, 16, 24, 8)
    exact_need, exact = tensors_of(call, torch.float64, True)
    need, tensors = tensors_of(call, torch.bfloat16, True)
    if dict(DISPATCHER.backends())[name].refuse(need):
        pytest.skip("refused")
    for ours, theirs in zip(run(name, need, tensors), run("reference", exact_need, exact), strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < 2e-2


def test_something_fast_serves_a_cpu():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        need, _ = tensors_of(CALLS["training"], dtype, True)
        assert DISPATCHER.choose(need)[0] != "reference"


def test_no_tokens_give_no_rows():
    empty = torch.zeros(0, 8)
    out = apply_experts(
        empty, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(4, 6, 8), torch.zeros(4, 8, 3)
    )
    assert out.shape == (0, 8)
