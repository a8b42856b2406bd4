"""Every expert backend computes what `reference` computes, forward and backward, or refuses."""

import pytest
import torch

from openmimo.kernels import native
from openmimo.kernels.operations import EXPERTS, ExpertsNeed, apply_experts
from openmimo.kernels.weights import PACKED, Packing, pack, quantize

needs_library = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
BACKENDS = [name for name, _ in EXPERTS.backends() if name != "reference"]

# tokens, experts, active, model dim, expert dim, experts that the router may choose
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
    out = dict(EXPERTS.backends())[name].run(*tensors, need=need)
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
    reason = dict(EXPERTS.backends())[name].refuse(need)
    if reason:
        pytest.skip(reason)
    for ours, theirs in zip(run(name, need, tensors), run("reference", need, tensors), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


# tokens, experts, active, model dim, expert dim, experts that the router may choose; rows of a multiple of 16 bytes
FLOAT32_CALLS = {
    "ragged": (37, 6, 3, 20, 12, 6),
    "one of each": (1, 4, 1, 8, 4, 4),
    "experts without tokens": (40, 8, 2, 16, 8, 3),
    "all experts": (9, 4, 4, 16, 20, 4),
}


def assert_close_in_float32(name, need, tensors):
    wide = [tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in tensors]
    wide = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in wide]
    exact = run("reference", need._replace(dtype=torch.float64), wide)
    ours = run(name, need, tensors)
    for one, other in zip(ours, exact, strict=True):
        assert (one.double() - other).norm() <= 2e-6 * other.norm()
    return ours


@pytest.mark.parametrize("call", FLOAT32_CALLS)
@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_in_float32_are_those_of_the_reference_in_float64(name, call):
    need, tensors = tensors_of(FLOAT32_CALLS[call], torch.float32, True)
    if reason := dict(EXPERTS.backends())[name].refuse(need):
        pytest.skip(reason)
    once = assert_close_in_float32(name, need, tensors)
    assert all(torch.equal(*pair) for pair in zip(once, run(name, need, tensors), strict=True)), "not deterministic"
    unused = torch.ones(need.num_experts, dtype=torch.bool)
    unused[tensors[1].unique()] = False
    assert once[3][unused].eq(0).all() and once[4][unused].eq(0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_token_that_chose_an_expert_twice_has_two_visits(name):
    need, (x, _, *rest) = tensors_of((5, 4, 2, 16, 8, 4), torch.float32, True)
    if reason := dict(EXPERTS.backends())[name].refuse(need):
        pytest.skip(reason)
    assert_close_in_float32(name, need, (x, torch.tensor([[1, 1], [0, 3], [2, 2], [3, 3], [1, 0]]), *rest))


@pytest.mark.parametrize("frozen", [0, 2, 3, 4], ids=["x", "weights", "gate_up", "down"])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(name, frozen):
    need, tensors = tensors_of((5, 4, 2, 16, 8, 4), torch.float32, True)
    if reason := dict(EXPERTS.backends())[name].refuse(need):
        pytest.skip(reason)
    whole = run(name, need, tensors)
    part = run(name, need, [tensor.detach() if at == frozen else tensor for at, tensor in enumerate(tensors)])
    del whole[1 + [0, 2, 3, 4].index(frozen)]
    assert all(torch.equal(*pair) for pair in zip(whole, part, strict=True))


@pytest.mark.parametrize("num_tokens", [300, 2048])
@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_stays_close(name, num_tokens):
    """With 2,048 tokens, the loop backend pads each expert's rows."""
    call = (num_tokens, 8, 2, 16, 24, 8)
    exact_need, exact = tensors_of(call, torch.float64, True)
    need, tensors = tensors_of(call, torch.bfloat16, True)
    if dict(EXPERTS.backends())[name].refuse(need):
        pytest.skip("refused")
    for ours, theirs in zip(run(name, need, tensors), run("reference", exact_need, exact), strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < 2e-2


def test_something_fast_serves_a_cpu():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        need, _ = tensors_of(CALLS["training"], dtype, True)
        assert EXPERTS.choose(need)[0] != "reference"


def test_no_tokens_give_no_rows():
    empty = torch.zeros(0, 8)
    out = apply_experts(
        empty, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(4, 6, 8), torch.zeros(4, 8, 3)
    )
    assert out.shape == (0, 8)


# tokens, experts, active, model dim, expert dim, experts that the router may choose
SMALL_CALLS = {
    "one token": (1, 8, 2, 48, 24, 8),
    "odd sizes": (5, 3, 2, 7, 5, 3),
    "crowded": (40, 6, 2, 200, 33, 2),
    "sparse": (7, 64, 4, 64, 32, 64),
    "most visits": (64, 4, 4, 16, 48, 4),
}


def inside_poison(tensor):
    """Copies the numbers between NaNs, so that a read out of bounds makes the comparison fail."""
    around = torch.full((tensor.numel() + 128,), float("nan"), dtype=tensor.dtype)
    return around[64:-64].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("call", SMALL_CALLS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_few_tokens_in_inference(name, call, dtype, tolerance):
    need, (x, ids, weights, gate_up, down) = tensors_of(SMALL_CALLS[call], dtype, False)
    if reason := dict(EXPERTS.backends())[name].refuse(need):
        pytest.skip(reason)
    wide = [tensor.double() for tensor in (x, gate_up, down)]
    exact_need = need._replace(dtype=torch.float64)
    (exact,) = run("reference", exact_need, (wide[0], ids, weights, wide[1], wide[2]))
    poisoned = [inside_poison(tensor) for tensor in (x, gate_up, down)]
    (ours,) = run(name, need, (poisoned[0], ids, weights.float(), poisoned[1], poisoned[2]))
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() / exact.norm() < tolerance


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", SMALL_CALLS)
def test_native_gives_a_token_the_same_bits_alone_and_in_any_batch(call, dtype):
    _, (x, ids, weights, gate_up, down) = tensors_of(SMALL_CALLS[call], dtype, False)
    visits = list(zip(x.split(1), ids.split(1), weights.split(1), strict=True))
    alone = torch.cat([apply_experts(*visit, gate_up, down) for visit in visits])
    for first in range(len(x)):
        assert torch.equal(apply_experts(x[first:], ids[first:], weights[first:], gate_up, down), alone[first:])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype):
    """The experts are large enough to be split between threads."""
    _, (x, ids, weights, gate_up, down) = tensors_of((5, 4, 2, 800, 450, 4), dtype, False)
    before = torch.get_num_threads()
    outputs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outputs.append(apply_experts(x, ids, weights, gate_up, down))
    torch.set_num_threads(before)
    assert torch.equal(*outputs)


@needs_library
def test_native_takes_an_expert_twice_and_names_one_that_is_not_there():
    need, (x, _, weights, gate_up, down) = tensors_of((3, 4, 2, 16, 8, 4), torch.float32, False)
    twice = torch.tensor([[1, 1], [0, 3], [2, 2]])
    (ours,), (exact,) = (
        run(name, need, (x, twice, weights.float(), gate_up, down)) for name in ("native", "reference")
    )
    assert torch.allclose(ours, exact, atol=1e-5)
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match="4 experts"):
            run("native", need, (x, torch.full((3, 2), wrong), weights.float(), gate_up, down))
    with pytest.raises(ValueError, match="do not fit"):
        run("native", need, (x, twice, weights.float(), gate_up[:, :-2], down))


BLOCK_SCALED_CALLS = {**SMALL_CALLS, "ragged blocks": (6, 3, 2, 130, 65, 3), "prompt": (70, 4, 2, 40, 24, 4)}


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
@pytest.mark.parametrize("call", BLOCK_SCALED_CALLS)
@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_block_scaled_experts_are_their_dequantized_values_in_float64(name, call, weight_format, dtype, tolerance):
    need, (x, ids, weights, *plain) = tensors_of(BLOCK_SCALED_CALLS[call], dtype, False)
    if reason := dict(EXPERTS.backends())[name].refuse(need._replace(weight_format=weight_format)):
        pytest.skip(reason)
    scaled = [quantize(tensor, weight_format) for tensor in plain]
    wide = [weight.dequantize(torch.float64) for weight in scaled]
    (exact,) = run("reference", need._replace(dtype=torch.float64), (x.double(), ids, weights, *wide))
    poisoned = [weight._replace(scales=inside_poison(weight.scales)) for weight in scaled]
    (ours,) = run(name, need, (inside_poison(x), ids, weights.float(), *poisoned))
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("weight_format", PACKED)
@pytest.mark.parametrize("call", ["crowded", "prompt"])
@pytest.mark.parametrize("name", BACKENDS)
def test_packed_experts_are_the_reference(name, call, weight_format):
    """Inputs of both products are rounded to int8. In float64 no rounding falls to the other side."""
    T, E, A, D, F, chosen = BLOCK_SCALED_CALLS[call]
    need, (x, ids, weights, *plain) = tensors_of((T, E, A, D, 2 * F, chosen), torch.float64, False)
    need = need._replace(weight_format=weight_format)
    if reason := dict(EXPERTS.backends())[name].refuse(need):
        pytest.skip(reason)
    packed = [pack(weight, Packing(weight_format, 2), matrices) for weight, matrices in zip(plain, (2, 1), strict=True)]
    (ours,), (exact,) = (run(which, need, (x, ids, weights, *packed)) for which in (name, "reference"))
    assert torch.allclose(ours, exact, rtol=1e-9, atol=1e-9)


def test_triton_refuses_what_it_does_not_multiply():
    need = ExpertsNeed(1, 8, 2, 16, 8, torch.float16, False, True, "fp8")
    changes = [
        {"num_tokens": 0}, {"num_tokens": 999, "weight_format": "plain"}, {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"needs_gradients": True}, {"weight_format": "mixed"}, {"model_dim": 15}, {"expert_dim": 7},
    ]  # fmt: skip
    assert all(dict(EXPERTS.backends())["triton"].refuse(need._replace(**change)) for change in changes)


@needs_library
def test_int8_experts_give_a_token_the_same_bits_alone_and_in_any_batch():
    _, (x, ids, weights, *plain) = tensors_of(SMALL_CALLS["sparse"], torch.float32, False)
    scaled = [quantize(tensor, "int8") for tensor in plain]
    alone = torch.cat([apply_experts(x[i : i + 1], ids[i : i + 1], weights[i : i + 1], *scaled) for i in range(len(x))])
    assert torch.equal(apply_experts(x, ids, weights, *scaled), alone)


def test_experts_of_two_formats_and_an_expert_chosen_twice():
    need, (x, ids, weights, gate_up, down) = tensors_of((3, 4, 2, 16, 8, 4), torch.float32, False)
    scaled = quantize(down, "fp8")
    exact = apply_experts(x, ids, weights, gate_up, scaled.dequantize(torch.float32))
    assert torch.allclose(apply_experts(x, ids, weights, gate_up, scaled), exact, atol=1e-5)
    twice, both = torch.tensor([[1, 1], [0, 3], [2, 2]]), (quantize(gate_up, "int8"), quantize(down, "int8"))
    (exact,) = run("reference", need, (x, twice, weights, *both))
    assert torch.allclose(apply_experts(x, twice, weights, *both), exact, atol=1e-5)
    if native.library() is not None:
        for wrong in (-1, 4):
            with pytest.raises(IndexError, match="4 experts"):
                run("int8", need, (x, torch.full((3, 2), wrong), weights, *both))
