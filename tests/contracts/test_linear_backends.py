"""Every linear backend agrees with float64 or refuses; the native one is bit-identical per row for any batch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.records import SamplingParams
from openmimo.engine.llm import LLM
from openmimo.kernels import native
from openmimo.kernels.linear import reference
from openmimo.kernels.linear.native import MAX_ROWS
from openmimo.kernels.operations import LINEAR, LinearNeed, joined_linear, linear
from openmimo.kernels.weights import PACKED, Packing, pack, quantize
from openmimo.model.hf import save_model
from openmimo.model.weight_formats import quantize_model

BACKENDS = dict(LINEAR.backends())
DTYPES = {"float32": (torch.float32, 2e-6), "bfloat16": (torch.bfloat16, 4e-3)}  # relative error of the whole output
SIZES = [(1, 1), (3, 7), (5, 48), (17, 200), (64, 128), (33, 65), (2, 1000)]  # outputs, input dim
needs_library = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")


def draw(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inside_poison(tensor):
    """Copies the numbers between NaNs, so that a read out of bounds makes the comparison fail."""
    around = torch.full((tensor.numel() + 128,), float("nan"), dtype=tensor.dtype)
    return around[64:-64].view(tensor.shape).copy_(tensor)


def relative_error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_backend_is_float64_or_refuses(name, dtype, size, with_bias):
    (outputs, dims), (dtype, tolerance) = size, DTYPES[dtype]
    weight = inside_poison(draw(outputs, dims, dtype=dtype, seed=1))
    bias = inside_poison(draw(outputs, dtype=dtype, seed=2)) if with_bias else None
    for rows in range(1, 34):
        if BACKENDS[name].refuse(LinearNeed(rows, dtype, False, True, True)):
            continue
        x = inside_poison(draw(rows, dims, dtype=dtype, seed=3))
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert relative_error(BACKENDS[name].run(x, ((weight, bias),)), exact) < tolerance


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_rows_on_a_cpu_are_native(dtype):
    for rows in (1, MAX_ROWS):
        assert LINEAR.choose(LinearNeed(rows, DTYPES[dtype][0], False, True, True))[0] == "native"


@needs_library
@pytest.mark.parametrize("size", [*SIZES, (300, 4096)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_and_in_any_batch(dtype, size):
    (outputs, dims), (dtype, _) = size, DTYPES[dtype]
    weight, x = draw(outputs, dims, dtype=dtype, seed=1), draw(MAX_ROWS, dims, dtype=dtype)
    alone = torch.cat([linear(row[None], weight) for row in x])
    for rows in range(1, MAX_ROWS + 1):
        assert torch.equal(linear(x[:rows], weight), alone[:rows])
        assert torch.equal(linear(x[-rows:], weight), alone[-rows:])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_threads_change_no_bit(dtype):
    """The weights are large enough to be split between threads."""
    weight, x = draw(2000, 1200, dtype=DTYPES[dtype][0], seed=1), draw(5, 1200, dtype=DTYPES[dtype][0])
    before = torch.get_num_threads()
    outputs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outputs.append(linear(x, weight))
    torch.set_num_threads(before)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_joined_layers_stand_side_by_side(name, dtype):
    dtype, tolerance = DTYPES[dtype]
    if BACKENDS[name].refuse(LinearNeed(6, dtype, False, True, True)):
        pytest.skip("refused")
    x = draw(6, 40, dtype=dtype)
    layers = tuple(
        (draw(outputs, 40, dtype=dtype, seed=outputs), draw(outputs, dtype=dtype) if outputs != 9 else None)
        for outputs in (16, 9, 35)
    )
    exact = [F.linear(x.double(), w.double(), None if b is None else b.double()) for w, b in layers]
    assert relative_error(BACKENDS[name].run(x, layers), torch.cat(exact, dim=-1)) < tolerance


@torch.inference_mode()
def test_strided_x_and_strided_weights():
    wide, weight = draw(8, 96, dtype=torch.float32), draw(30, 48, dtype=torch.float32, seed=1)
    for x in (wide[:, 16:64], wide[::2, :48], draw(48, 8, dtype=torch.float32).t()):
        exact = F.linear(x.double(), weight.double())
        assert relative_error(linear(x, weight), exact) < 2e-6
        assert relative_error(linear(x, weight.t().contiguous().t()), exact) < 2e-6


@torch.inference_mode()
def test_no_rows_no_outputs_and_more_axes():
    weight = draw(6, 5, dtype=torch.float32)
    assert linear(torch.zeros(0, 5), weight).shape == (0, 6)
    assert linear(torch.zeros(3, 5), weight[:0]).shape == (3, 0)
    x = draw(2, 3, 5, dtype=torch.float32)
    assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-6)


def test_gradients_go_to_all():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, 5), (4, 5), (4,)))
    ours = torch.autograd.grad(joined_linear(x, ((weight, bias), (weight, None))).sum(), (x, weight, bias))
    theirs = torch.autograd.grad((F.linear(x, weight, bias) + F.linear(x, weight)).sum(), (x, weight, bias))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "native"])
def test_gradients_of_bfloat16_are_those_of_float64(name):
    draws = [
        draw(*shape, dtype=torch.bfloat16, seed=s) for s, shape in enumerate([(70, 40), (30, 40), (30,), (70, 30)])
    ]
    x, weight, bias = (tensor.requires_grad_() for tensor in draws[:3])
    if reason := BACKENDS[name].refuse(LinearNeed(70, x.dtype, True, True, True)):
        pytest.skip(reason)
    inputs = (x, weight, bias)
    ours = torch.autograd.grad(BACKENDS[name].run(x, ((weight, bias),)), inputs, draws[3])
    exact = torch.autograd.grad(F.linear(*(t.double() for t in inputs)), inputs, draws[3].double())
    for mine, theirs in zip(ours, exact, strict=True):
        assert relative_error(mine, theirs.double()) < 1e-2


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.zeros(4, 5, dtype=torch.float64)], ids=["size", "dtype"])
@torch.inference_mode()
def test_what_does_not_fit_is_torchs_error(weight):
    with pytest.raises(RuntimeError):
        linear(torch.zeros(2, 5), weight)


# Outputs and input dim: partial blocks at both edges, several tiles.
SCALED_SIZES = [(1, 1), (17, 200), (129, 130), (300, 257)]
SCALED_DTYPES = {**DTYPES, "float16": (torch.float16, 1e-3)}


def poisoned(weight):
    """The same block-scaled weight with NaN around its scales."""
    return weight._replace(scales=inside_poison(weight.scales))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("size", SCALED_SIZES, ids=str)
@pytest.mark.parametrize("dtype", SCALED_DTYPES)
@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_block_scaled_weights_are_their_dequantized_values_in_float64(name, weight_format, dtype, size, with_bias):
    (outputs, dims), (dtype, tolerance) = size, SCALED_DTYPES[dtype]
    weight = poisoned(quantize(draw(outputs, dims, dtype=torch.float32, seed=1), weight_format))
    layers = (
        (weight, inside_poison(draw(outputs, dtype=dtype, seed=2)) if with_bias else None),
        (poisoned(quantize(draw(5, dims, dtype=torch.float32, seed=4), weight_format)), None),
    )
    for rows in (1, 3, 32, 33, 200):
        if BACKENDS[name].refuse(LinearNeed(rows, dtype, False, True, True, weight_format, dims)):
            continue
        x = inside_poison(draw(rows, dims + 8, dtype=dtype, seed=3))[:, :dims]
        exact = [
            F.linear(x.double(), w.dequantize(torch.float64), None if b is None else b.double()) for w, b in layers
        ]
        assert relative_error(BACKENDS[name].run(x, layers), torch.cat(exact, dim=-1)) < tolerance


PACKED_SIZES = [(34, 65), (66, 640)]


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("size", PACKED_SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_format", PACKED)
@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_packed_weights_are_the_reference_in_float64(name, weight_format, dtype, size, with_bias):
    """Inputs are rounded to int8 in the definition, from the same numbers in both computations."""
    (outputs, dims), (dtype, tolerance) = size, DTYPES[dtype]
    packing = Packing(weight_format, 2, per_row=with_bias)
    layers = (
        (
            poisoned(pack(draw(outputs, dims, dtype=torch.float32, seed=1), packing)),
            inside_poison(draw(outputs, dtype=dtype, seed=2)) if with_bias else None,
        ),
        (poisoned(pack(draw(8, dims, dtype=torch.float32, seed=4), packing, 2)), None),
    )
    for rows in (3, 33):
        if BACKENDS[name].refuse(LinearNeed(rows, dtype, False, True, True, weight_format)):
            continue
        x = inside_poison(draw(rows, dims + 8, dtype=dtype, seed=3))[:, :dims]
        exact = reference.run(x.double(), tuple((w, None if b is None else b.double()) for w, b in layers))
        error = relative_error(BACKENDS[name].run(x, layers), exact)
        assert error < (3 * tolerance if name == "reference" else tolerance)


@needs_library
@pytest.mark.parametrize("weight_format", PACKED)
@torch.inference_mode()
def test_a_row_of_packed_products_has_the_same_bits_in_any_batch(weight_format):
    weight, x = (
        pack(draw(66, 200, dtype=torch.float32, seed=1), Packing(weight_format, 2)),
        draw(MAX_ROWS, 200, dtype=torch.float32),
    )
    assert LINEAR.choose(LinearNeed(1, torch.float32, False, True, True, weight_format))[0] == "packed"
    alone = torch.cat([linear(row[None], weight) for row in x])
    for rows in range(1, MAX_ROWS + 1):
        assert torch.equal(linear(x[:rows], weight), alone[:rows])


def of_integers(outputs, dims, packing, matrices):
    """A packed weight whose scales are 1."""
    weight = pack(draw(outputs, dims, dtype=torch.float32, seed=1), packing, matrices)
    return weight._replace(scales=torch.ones_like(weight.scales))


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("weight_format", PACKED)
@torch.inference_mode()
def test_triton_sums_packed_weights_exactly(weight_format, rows):
    """Inputs are integers up to 127, so that their scales are 1, and each output is an integer."""
    need = LinearNeed(rows, torch.float32, False, True, True, weight_format)
    if reason := BACKENDS["triton_packed"].refuse(need):
        pytest.skip(reason)
    outputs, dims = (66 if weight_format == "fairy" else 67), 1101
    weight = of_integers(2 * outputs, dims, Packing(weight_format, 2, per_row=rows == 5), 2)
    x = torch.randint(-127, 128, (rows, dims), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0], x[:, -1] = 127.0, -127.0
    layers = ((weight.rows(outputs, 2 * outputs), None), (weight, None))
    exact = torch.cat([x.double() @ w.dequantize(torch.float64).T for w, _ in layers], dim=1)
    assert torch.equal(BACKENDS["triton_packed"].run(x, layers).double(), exact)


@pytest.mark.parametrize("weight_format", PACKED)
@torch.inference_mode()
def test_triton_has_the_same_bits_of_packed_products_for_a_row_alone(weight_format):
    need = LinearNeed(1, torch.float32, False, True, True, weight_format)
    if reason := BACKENDS["triton_packed"].refuse(need):
        pytest.skip(reason)
    layers = ((pack(draw(70, 600, dtype=torch.float32, seed=1), Packing(weight_format, 2)), None),)
    x = draw(40, 600, dtype=torch.float32)
    x[1], x[2, 3], x[3, 599] = 0.0, float("nan"), float("inf")
    out = BACKENDS["triton_packed"].run(x, layers)
    for row in (0, 39):
        assert torch.equal(BACKENDS["triton_packed"].run(x[row : row + 1], layers)[0], out[row])
    assert (out[1] == 0).all()
    assert torch.isnan(out[2:4]).all()
    assert torch.isfinite(out[4:]).all()


@pytest.mark.parametrize("weight_format", PACKED)
def test_triton_multiplies_packed_weights_where_its_name_asks_for_it(weight_format):
    need = LinearNeed(1, torch.float16, False, True, False, weight_format)
    assert LINEAR.best(need)[0] == "dequantized"
    changes = [
        {"num_rows": None}, {"num_rows": 0}, {"num_rows": 129}, {"dtype": torch.float64}, {"readable": False},
        {"needs_gradients": True}, {"weight_format": "plain"}, {"weight_format": "latent"},
    ]  # fmt: skip
    assert all(BACKENDS["triton_packed"].refuse(need._replace(**change)) for change in changes)


def test_triton_refuses_what_it_does_not_multiply():
    need = LinearNeed(1, torch.float16, False, True, True, "fp8", 64)
    changes = [
        {"num_rows": None}, {"num_rows": 0}, {"dtype": torch.float32}, {"dtype": torch.float64}, {"readable": False},
        {"needs_gradients": True}, {"weight_format": "plain"}, {"weight_format": "int8_blocks"}, {"input_dim": 63},
    ]  # fmt: skip
    assert all(BACKENDS["triton"].refuse(need._replace(**change)) for change in changes)


@torch.inference_mode()
def test_triton_has_the_same_bits_for_a_row_alone():
    need = LinearNeed(1, torch.float16, False, True, True, "fp8", 300)
    if reason := BACKENDS["triton"].refuse(need):
        pytest.skip(reason)
    layers = ((quantize(draw(70, 300, dtype=torch.float32, seed=1), "fp8"), None),)
    x = draw(9, 300, dtype=torch.float16)
    assert torch.equal(BACKENDS["triton"].run(x[:1], layers)[0], BACKENDS["triton"].run(x, layers)[0])


@torch.inference_mode()
def test_a_dequantized_tile_holds_a_part_of_the_rows():
    weight = quantize(draw(3000, 700, dtype=torch.float32), "fp8")
    tiles = list(weight.tiles(torch.float32))
    assert len(tiles) > 1
    assert torch.equal(torch.cat(tiles), weight.dequantize(torch.float32))


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
@torch.inference_mode()
def test_strided_codes_and_layers_of_several_formats(weight_format):
    x, plain = draw(4, 48, dtype=torch.float32), draw(30, 48, dtype=torch.float32, seed=1)
    scaled = quantize(plain, weight_format)
    strided = scaled._replace(codes=scaled.codes.t().contiguous().t())
    exact = F.linear(x.double(), scaled.dequantize(torch.float64))
    assert relative_error(linear(x, strided), exact) < 2e-6
    both = joined_linear(x, ((scaled, None), (plain, None)))
    assert relative_error(both, torch.cat([exact, F.linear(x.double(), plain.double())], dim=-1)) < 2e-6


def test_gradients_pass_through_block_scaled_weights():
    x, weight = torch.randn(3, 50, requires_grad=True), quantize(torch.randn(20, 50), "int8")
    (ours,) = torch.autograd.grad(linear(x, weight).sum(), x)
    assert torch.allclose(ours, weight.dequantize(torch.float32).sum(dim=0).expand(3, -1), atol=1e-5)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_rows_with_int8_weights_are_native(dtype):
    assert LINEAR.choose(LinearNeed(1, DTYPES[dtype][0], False, True, True, "int8"))[0] == "int8"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_int8_weights(dtype, size):
    (outputs, dims), (dtype, tolerance) = size, DTYPES[dtype]
    weight = draw(outputs, dims, dtype=torch.float32, seed=1)
    weight[0] = 0.0
    quantized = quantize(weight, "int8")
    quantized = quantized._replace(scales=inside_poison(quantized.scales))
    assert ((quantized.dequantize(torch.float32) - weight).abs() <= 0.5001 * quantized.scales).all()
    x = inside_poison(draw(MAX_ROWS, dims, dtype=dtype))
    exact = F.linear(x.double(), quantized.dequantize(torch.float64))
    for rows in range(1, MAX_ROWS + 1):
        ours = linear(x[:rows], quantized)
        assert torch.allclose(ours.double(), exact[:rows], rtol=tolerance, atol=tolerance * exact.abs().max().item())
        if native.library() is not None:
            assert torch.equal(ours[-1:], linear(x[rows - 1 : rows], quantized))
    more = linear(torch.cat([x, x]), quantized)
    assert torch.allclose(more.double(), exact.repeat(2, 1), rtol=tolerance, atol=tolerance * exact.abs().max().item())


def test_a_quantized_model_decodes_near_to_its_own_and_is_not_saved(tmp_path):
    model, exact = (tiny_model(3, mtp_heads=1) for _ in range(2))
    quantize_model(model, "int8")
    ids = torch.randint(0, 160, (60,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model.logits(ids).softmax(-1) - exact.logits(ids).softmax(-1)).abs().sum(-1).mean()
    assert 0 < difference < 0.2
    params = SamplingParams(max_tokens=20, temperature=0.0)
    plain, drafted = (
        LLM(model, speculative=speculative).generate([ids.tolist()], params) for speculative in (False, True)
    )
    assert plain[0].token_ids == drafted[0].token_ids
    with pytest.raises(CheckpointError, match="quantized"):
        save_model(model, tmp_path / "model")
    with pytest.raises(ConfigError, match="caller's"):
        LLM(exact, int8=True)
