"""Kernels of decoding on an accelerator: caches and weights in every format, fused operations, and rows in any batch.

`pytest -m gpu` runs these tests on a machine with an accelerator.
"""

import pytest
import torch
from update_calls import CALLS, assert_is_the_reference, call_of

from openmimo.kernels.attention import UPDATE, Pages, UpdateNeed
from openmimo.kernels.operations import (
    ADD_NORM,
    EXPERTS,
    LINEAR,
    ExpertsNeed,
    LinearNeed,
    NormNeed,
    apply_experts,
    joined_linear,
)
from openmimo.kernels.weights import PACKED, Packing, pack, quantize
from openmimo.runtime.device import resolve_device

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device():
    found = resolve_device("auto")
    if found.type == "cpu":
        pytest.skip("no accelerator")
    return found


def relative(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(
    "dtype, cached", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn")]
)
@pytest.mark.parametrize("name", CALLS)
@torch.inference_mode()
def test_new_tokens_are_rotated_stored_and_attend(device, name, dtype, cached):
    dtype, cached = getattr(torch, dtype), getattr(torch, cached)
    (fresh, pages, page_T, slot_T, sink), arguments = call_of(name, dtype, cached)
    fresh = fresh._replace(**{part: getattr(fresh, part).to(device) for part in ("joined_TJ", "cos_TR", "sin_TR")})
    pages = Pages(*(x.to(device) for x in pages))
    rest = [None if x is None else x.to(device) for x in (page_T, slot_T, sink)]
    arguments = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    need = UpdateNeed(arguments["longest_query"], dtype, cached, False, True, False, fresh.key_dim, fresh.value_dim)
    chosen, backend = UPDATE.choose(need)
    assert chosen == "triton"
    assert_is_the_reference(backend, (fresh, pages, *rest), arguments)


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
@pytest.mark.parametrize(
    "rows, sizes, dims", [(1, (17,), 200), (33, (129, 5, 300), 130), (70, (300, 64), 4500), (300, (129, 5, 300), 130)]
)
@torch.inference_mode()
def test_linear_layers_with_block_scaled_weights(device, rows, sizes, dims, weight_format):
    weights = [quantize(torch.randn(outputs, dims, device=device), weight_format) for outputs in sizes]
    x = torch.randn(rows, dims, device=device).bfloat16()
    layers = tuple((weight, None) for weight in weights)
    ours = joined_linear(x, layers)
    exact = torch.cat([x.double() @ weight.dequantize(torch.float64).T for weight in weights], dim=1)
    assert LINEAR.choose(LinearNeed(rows, x.dtype, False, True, False, weight_format, dims))[0] == "triton"
    assert relative(ours, exact) < 4e-3
    assert torch.equal(joined_linear(x[:1], layers)[0], joined_linear(x[:7], layers)[0])
    for factor in (2.0**40, 2.0**-40):  # float16 holds no such numbers
        far = (factor * x.float()).bfloat16()
        assert relative(joined_linear(far, layers), factor * exact) < 4e-3


@pytest.mark.parametrize("weight_format", PACKED)
@pytest.mark.parametrize("rows, outputs, dims", [(1, 66, 200), (9, 2048, 2048), (33, 258, 4500), (128, 130, 1100)])
@torch.inference_mode()
def test_linear_layers_with_packed_weights(device, rows, outputs, dims, weight_format):
    """With scales of 1 for weights and inputs, all sums are integers below 2^24, and float32 holds them exactly."""
    backend, packing = dict(LINEAR.backends())["triton_packed"], Packing(weight_format, 2)
    need = LinearNeed(rows, torch.float32, False, True, False, weight_format, dims)
    assert backend.refuse(need) is None
    weight = pack(torch.randn(2 * outputs, dims, device=device), packing, 2)
    ones = weight._replace(scales=torch.ones_like(weight.scales))
    x = torch.randint(-127, 128, (rows, dims), device=device).float()
    x[:, 0], x[:, -1] = 127.0, -127.0
    layers = ((ones, None), (ones.rows(0, outputs), None))
    exact = torch.cat([x.double() @ part.dequantize(torch.float64).T for part, _ in layers], dim=1)
    assert torch.equal(backend.run(x, layers).double(), exact)
    per_row = pack(torch.randn(outputs, dims, device=device), packing._replace(per_row=True))
    layers = ((weight, None), (per_row, torch.randn(outputs, device=device).bfloat16()))
    x = torch.randn(rows, dims, device=device).bfloat16()
    ours = backend.run(x, layers)
    wide = tuple((part, None if bias is None else bias.double()) for part, bias in layers)
    assert relative(ours, dict(LINEAR.backends())["reference"].run(x.double(), wide)) < 4e-3
    assert torch.equal(backend.run(x[:1], layers)[0], ours[0])


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 5, 64, 256, 2050])
@torch.inference_mode()
def test_experts_with_block_scaled_weights(device, tokens, weight_format):
    E, A, D, F = 16, 4, 264, 136
    ids = torch.rand(tokens, E, device=device).topk(A).indices
    x, weights = torch.randn(tokens, D, device=device).bfloat16(), torch.rand(tokens, A, device=device)
    scaled = [quantize(0.1 * torch.randn(shape, device=device), weight_format) for shape in ((E, 2 * F, D), (E, D, F))]
    need = ExpertsNeed(tokens, E, A, D, F, x.dtype, False, False, weight_format)
    assert EXPERTS.choose(need)[0] == "triton"
    ours = apply_experts(x, ids, weights, *scaled)
    wide = [weight.dequantize(torch.float64) for weight in scaled]
    exact = dict(EXPERTS.backends())["reference"].run(x.double(), ids, weights.double(), *wide, need=need)
    assert relative(ours, exact) < 1e-2
    assert torch.equal(apply_experts(x[:1], ids[:1], weights[:1], *scaled)[0], ours[0])


@torch.inference_mode()
def test_a_sum_and_its_norm(device):
    x, added = (torch.randn(33, 4096, device=device).bfloat16() for _ in range(2))
    weight = torch.randn(4096, device=device).bfloat16()
    name, backend = ADD_NORM.choose(NormNeed(x.numel(), x.dtype, False, True, False))
    total, normalized = backend.run(x, added, weight, 1e-5)
    expected = dict(ADD_NORM.backends())["reference"].run(x, added, weight, 1e-5)
    assert name == "triton"
    assert torch.equal(total, expected[0])
    assert torch.equal(normalized, expected[1])
