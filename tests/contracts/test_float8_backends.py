"""Products of FP8 training: the definition against float64, and every backend against the definition."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

from openmimo.kernels.float8._products import _Experts, _Linear, sort_choices
from openmimo.kernels.float8.reference import FUNCTIONS as REFERENCE
from openmimo.kernels.operations import FLOAT8, Float8Need, apply_experts, joined_linear
from openmimo.kernels.weights import Float8Latent, quantize

BACKENDS = dict(FLOAT8.backends())
HALF_STEP = 2**-4  # of a float8_e4m3fn number, relative
SMALLEST_HALF_STEP = 2**-10  # of numbers below 2^-6


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


class TestCodes:
    @pytest.mark.parametrize("shape", [(1, 128), (5, 300), (130, 64), (3, 1)], ids=str)
    def test_a_number_is_at_most_half_a_step_from_its_code(self, shape):
        x = draw(*shape) * torch.logspace(-9, 4, shape[1])
        rows, columns = REFERENCE.quantize(x, None, True)
        for codes, exact in ((rows, x), (columns, x.T)):
            scales = codes.scales.repeat_interleave(128, 1)[:, : exact.shape[1]].double()
            bound = torch.maximum(exact.double().abs() * HALF_STEP, SMALLEST_HALF_STEP * scales) * 1.001
            assert ((codes.dequantize(torch.float64) - exact.double()).abs() <= bound).all()

    def test_a_scale_covers_1_x_128_numbers(self):
        x = torch.ones(2, 256)
        x[0, 130], x[1, 5] = 1000.0, 10.0
        rows, columns = REFERENCE.quantize(x, None, True)
        assert torch.equal(rows.scales * 448, torch.tensor([[1.0, 1000.0], [10.0, 1.0]]))
        assert columns.scales.shape == (256, 1)
        assert columns.scales[130] * 448 == 1000.0
        assert columns.scales[131] * 448 == 1.0

    def test_an_outlier_costs_the_numbers_of_its_own_block_only(self):
        x = draw(4, 256)
        x[2, 7] = 1e4
        values = REFERENCE.quantize(x, None, False)[0].dequantize(torch.float32)
        assert values[2, 7] == 1e4
        assert relative_error(values[2, 128:], x[2, 128:]) < 0.04
        assert relative_error(values[[0, 1, 3]], x[[0, 1, 3]]) < 0.04

    @pytest.mark.parametrize("value", [0.0, 1e-38, -1e-31])
    def test_a_block_without_numbers_is_zero_with_scale_one(self, value):
        codes, _ = REFERENCE.quantize(torch.full((1, 128), value), None, False)
        assert codes.scales.item() == 1.0
        assert not codes.dequantize(torch.float32).any()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_stays_so_in_its_row(self, value):
        x = draw(3, 200)
        x[1, 140] = value
        values = REFERENCE.quantize(x, None, False)[0].dequantize(torch.float32)
        assert not values[1, 140].isfinite()
        assert values[[0, 2]].isfinite().all()
        assert values[1, :128].isfinite().all()

    def test_a_weight_has_the_codes_of_the_format_fp8(self):
        """FFNs and experts that were trained in FP8 and are then served in FP8 multiply by the same numbers."""
        weight = draw(256, 200)
        codes = REFERENCE.quantize_weight((Float8Latent(weight, 1),), False)
        assert torch.equal(codes.dequantize(torch.float32)[0], quantize(weight, "fp8").dequantize(torch.float32))
        transposed = REFERENCE.quantize_weight((Float8Latent(weight, 1),), True)
        assert torch.equal(transposed.dequantize(torch.float32)[0], codes.dequantize(torch.float32)[0].T)

    def test_gate_and_up_share_no_block(self):
        weight = torch.cat([torch.full((1, 96, 128), 1e4), torch.full((1, 96, 128), 1.0)], dim=1)
        values = REFERENCE.quantize_weight((Float8Latent(weight, 2),), False).dequantize(torch.float32)
        assert torch.equal(values, weight)


class TestChoices:
    @pytest.mark.parametrize("num_tokens", [0, 1, 3, 200])
    def test_rows_of_an_expert_are_together_and_begin_at_multiples_of_128(self, num_tokens):
        ids = torch.randint(0, 6, (num_tokens, 2), generator=torch.Generator().manual_seed(1))
        row_M, place_P, ends_E = sort_choices(ids, 7)
        assert (ends_E % 128 == 0).all()
        assert len(place_P) >= int(ends_E[-1])
        starts = torch.cat([torch.zeros(1, dtype=torch.int32), ends_E[:-1]])
        expert = ids.flatten()
        assert ((starts[expert] <= row_M) & (row_M < ends_E[expert])).all()
        assert torch.equal(place_P[row_M], torch.arange(num_tokens).repeat_interleave(2))
        assert (place_P >= 0).sum() == 2 * num_tokens


def values_of(codes):
    return codes.dequantize(torch.float64)


def group_ranges(ends):
    return list(itertools.pairwise([0, *ends.tolist()]))


@pytest.mark.parametrize("dims", [(128, 256), (256, 384), (96, 40)], ids=str)
def test_the_definition_sums_exact_products_in_float32(dims):
    """A product of codes is exact, so that only sums round: 2^-24 for each addition."""
    C, N = dims
    ends = torch.tensor([128, 128, 384], dtype=torch.int32)
    x, gradient, weight = draw(384, C), draw(384, N, seed=1), draw(3, N, C, seed=2)
    rows, columns = REFERENCE.quantize(x, None, True)
    gradient_rows, gradient_columns = REFERENCE.quantize(gradient, None, True)
    codes, transposed = (REFERENCE.quantize_weight((Float8Latent(weight, 1),), flag) for flag in (False, True))
    output = REFERENCE.multiply(rows, codes, ends, torch.float32)
    back = REFERENCE.multiply(gradient_rows, transposed, ends, torch.float32)
    for group, (start, stop) in enumerate(group_ranges(ends)):
        part = slice(start, stop)
        assert_close_sums(output[part], values_of(rows)[part], values_of(codes)[group].T)
        assert_close_sums(back[part], values_of(gradient_rows)[part], values_of(codes)[group])
    products = REFERENCE.weight_gradient(gradient_columns, columns, ends)
    for group, (start, stop) in enumerate(group_ranges(ends)):
        part = slice(start, stop)
        assert_close_sums(products[group], values_of(gradient_columns)[:, part], values_of(columns)[:, part].T)


def assert_close_sums(ours, left, right):
    bound = (left.abs() @ right.abs()) * (left.shape[1] + 4) * 2**-24
    assert ((ours.double() - left @ right).abs() <= bound).all()


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("reference", "triton")])
@pytest.mark.parametrize("dims", [(128, 256), (64, 40)], ids=str)
def test_products_of_a_backend_are_those_of_the_definition(name, dims):
    functions, (C, N) = BACKENDS[name].run, dims
    ends = torch.tensor([128, 128, 384], dtype=torch.int32)
    rows, columns = REFERENCE.quantize(draw(384, C), None, True)
    gradient, gradient_columns = REFERENCE.quantize(draw(384, N, seed=1), None, True)
    weights = [REFERENCE.quantize_weight((Float8Latent(draw(3, N, C, seed=2), 1),), flag) for flag in (False, True)]
    for left, right in ((rows, weights[0]), (gradient, weights[1])):
        ours = functions.multiply(left, right, ends, torch.bfloat16)
        assert relative_error(ours, REFERENCE.multiply(left, right, ends, torch.float32)) < 4e-3
        one = right._replace(codes=right.codes[:1], scales=right.scales[:1])
        ours = functions.multiply(left, one, None, torch.bfloat16)
        assert relative_error(ours, REFERENCE.multiply(left, one, None, torch.float32)) < 4e-3
    for groups in (ends, None):
        ours = functions.weight_gradient(gradient_columns, columns, groups)
        assert relative_error(ours, REFERENCE.weight_gradient(gradient_columns, columns, groups)) < 4e-3


def test_a_gpu_computes_the_arithmetic_with_torch_until_its_kernels_are_asked_for():
    assert FLOAT8.best(Float8Need((1024, 512), 64, torch.bfloat16, False))[0] == "dequantized"
    assert FLOAT8.best(Float8Need((1024, 510), 64, torch.bfloat16, False))[0] == "reference"
    assert FLOAT8.best(Float8Need((1024, 512), 64, torch.bfloat16, True))[0] == "reference"


def assert_same_codes(ours, theirs, *, different=0.002):
    """Numbers that differ in their last bit have the same code, but for a few at the border of two codes."""
    assert torch.allclose(ours.scales, theirs.scales, rtol=1e-5)
    is_other = ours.codes.float() != theirs.codes.float()
    assert is_other.float().mean() <= different
    assert torch.allclose(ours.dequantize(torch.float32), theirs.dequantize(torch.float32), rtol=0.13, atol=1e-4)


class TestGradients:
    """The expectation: each product with the values of the codes of its two operands, in float64."""

    @pytest.mark.parametrize("case", [(140, 128, (256, 128, 128)), (50, 96, (70, 33))], ids=str)
    def test_linear(self, case):
        R, D, outputs = case
        x, gradient = draw(R, D).requires_grad_(), draw(R, sum(outputs), seed=9)
        weights = [draw(size, D, seed=size).requires_grad_() for size in outputs]
        biases = [None, *(draw(size, seed=size + 1).requires_grad_() for size in outputs[1:])]
        out = joined_linear(x, tuple((Float8Latent(w, 1), b) for w, b in zip(weights, biases, strict=True)))
        inputs = (x, *weights, *biases[1:])
        ours = torch.autograd.grad(out, inputs, gradient)
        rows, columns = (values_of(codes) for codes in REFERENCE.quantize(x.detach(), None, True))
        exact_x, start = torch.zeros(R, D, dtype=torch.float64), 0
        for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            part = slice(start, start := start + len(weight))
            value = quantize(weight, "fp8").dequantize(torch.float64)
            exact = rows @ value.T + (0 if bias is None else bias.detach().double())
            assert relative_error(out[:, part].detach(), exact) < 1e-6
            g_rows, g_columns = REFERENCE.quantize(gradient[:, part], None, True)
            exact_x += values_of(g_rows) @ value
            assert relative_error(ours[1 + place], values_of(g_columns) @ columns.T) < 1e-6
        assert relative_error(ours[0], exact_x) < 1e-6
        for mine, part in zip(ours[1 + len(outputs) :], gradient.split(outputs, dim=1)[1:], strict=True):
            assert torch.allclose(mine, part.sum(dim=0), atol=1e-5)

    @pytest.mark.parametrize("expert_dim", [128, 48])
    def test_experts(self, expert_dim):
        T, D, E, A = 60, 128, 4, 2
        x, gradient = draw(T, D).requires_grad_(), draw(T, D, seed=1)
        gate_up = draw(E, 2 * expert_dim, D, seed=2).mul(D**-0.5).requires_grad_()
        down = draw(E, D, expert_dim, seed=3).mul(expert_dim**-0.5).requires_grad_()
        ids = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:A] for t in range(T)])
        ids[ids == 2] = 1  # an expert without tokens
        weights = torch.rand(T, A, generator=torch.Generator().manual_seed(4)).requires_grad_()
        inputs = (x, weights, gate_up, down)
        out = apply_experts(x, ids, weights, Float8Latent(gate_up, 2), Float8Latent(down, 1))
        ours = torch.autograd.grad(out, inputs, gradient)
        plain = apply_experts(x, ids, weights, gate_up, down)
        assert relative_error(out.detach(), plain.detach()) < 0.08
        exact = torch.autograd.grad(plain, inputs, gradient)
        for mine, theirs in zip(ours, exact, strict=True):
            assert relative_error(mine, theirs) < 0.1
        assert not ours[2][2].any()
        assert not ours[3][2].any()

    def test_the_gradient_of_the_gate_is_that_of_its_codes(self):
        gate_up, gradient, weights = draw(20, 256), draw(20, 128, seed=1), draw(20, seed=2)
        hidden, codes = REFERENCE.gate(gate_up, weights, True)
        exact = F.silu(gate_up[:, :128]) * gate_up[:, 128:] * weights[:, None]
        assert_same_codes(hidden, REFERENCE.quantize(exact, None, False)[0])
        assert_same_codes(codes, REFERENCE.quantize(gate_up, None, False)[0])
        values = codes.dequantize(torch.float32).requires_grad_()
        gate, up = values.chunk(2, dim=-1)
        exact = F.silu(gate) * up * weights.requires_grad_()[:, None]
        exact_gradient, of_weights = torch.autograd.grad(exact, (values, weights), gradient)
        columns, *both, of_rows = REFERENCE.gate_backward(codes, weights.detach(), gradient, True)
        assert_same_codes(columns, REFERENCE.quantize(exact.detach().T, None, False)[0])
        assert torch.allclose(of_rows, of_weights, atol=1e-5)
        for ours, theirs in zip(both, REFERENCE.quantize(exact_gradient, None, True), strict=True):
            assert_same_codes(ours, theirs)

    def test_what_is_not_finite_reaches_output_and_gradients(self):
        x, weight = draw(4, 128).requires_grad_(), draw(128, 128, seed=1).requires_grad_()
        gradient = torch.zeros(4, 128)
        gradient[2, 3] = float("inf")
        out = joined_linear(x, ((Float8Latent(weight, 1), None),))
        of_x, of_weight = torch.autograd.grad(out, (x, weight), gradient)
        assert not of_x[2].isfinite().any()
        assert of_x[[0, 1, 3]].isfinite().all()
        assert not of_weight[3].isfinite().any()
        x = x.detach().clone()
        x[1, 1] = float("nan")
        assert joined_linear(x, ((Float8Latent(weight, 1), None),))[1].isnan().all()


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "triton" or os.environ.get("TRITON_INTERPRET")])
def test_no_rows_give_no_rows_and_gradients_of_zero(name):
    """A rank of expert parallelism without choices, and a chunk without tokens."""
    functions, dtype = BACKENDS[name].run, torch.bfloat16
    x, weights = draw(0, 128, dtype=dtype).requires_grad_(), draw(0, 2).requires_grad_()
    gate_up, down, weight = (draw(*shape).requires_grad_() for shape in ((3, 256, 128), (3, 128, 128), (256, 128)))
    places = sort_choices(torch.zeros(0, 2, dtype=torch.int64), 3)
    experts = _Experts.apply(x, weights, functions, True, places, gate_up, down)
    linear = _Linear.apply(x, functions, True, weight)
    assert experts.shape == (0, 128)
    assert linear.shape == (0, 256)
    gradients = torch.autograd.grad(experts.sum() + linear.sum(), (x, weights, gate_up, down, weight))
    assert gradients[0].shape == x.shape
    assert gradients[1].shape == weights.shape
    assert not any(gradient.any() for gradient in gradients[2:])


def test_the_backward_pass_keeps_one_byte_for_a_number_and_reads_it_once():
    """The input of a linear layer and gate and up of experts: 1 byte, and 4 bytes for 128 numbers.

    Recomputation requires that the saved tensors are read once.
    """
    kept, read = [], []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    def unpack(tensor):
        read.append(tensor)
        return tensor

    T, D, F_, E = 512, 256, 128, 2
    x, weight = draw(T, D, dtype=torch.bfloat16).requires_grad_(), draw(256, D).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        joined_linear(x, ((Float8Latent(weight, 1), None),)).sum().backward()
    assert len(read) == len(kept)
    assert sum(t.nbytes for t in kept if t is not weight) == T * D + 4 * D * (T // 128)
    kept.clear()
    read.clear()
    gate_up, down = draw(E, 2 * F_, D).requires_grad_(), draw(E, D, F_).requires_grad_()
    ids = torch.arange(T)[:, None] % E
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        apply_experts(x, ids, torch.ones(T, 1), Float8Latent(gate_up, 2), Float8Latent(down, 1)).sum().backward()
    assert len(read) == len(kept)
    P = (T // 128 + E) * 128
    assert sum(t.nbytes for t in kept if t.dtype == torch.float8_e4m3fn) == P * (D + 2 * F_)
    others = sum(t.nbytes for t in kept if t.dtype != torch.float8_e4m3fn and t is not gate_up and t is not down)
    assert others < 80 * P  # scales, places and weights


@torch.no_grad()
def test_no_rows_and_more_axes():
    weight = Float8Latent(draw(6, 5), 1)
    assert joined_linear(torch.zeros(0, 5), ((weight, None),)).shape == (0, 6)
    assert joined_linear(draw(2, 3, 5), ((weight, None),)).shape == (2, 3, 6)


@pytest.mark.gpu
@pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET") and not torch.cuda.is_available(),
    reason="needs Triton's interpreter or a GPU",
)
class TestTriton:
    """In Triton's interpreter, where it is installed (see `make interpret`): codes have the bits of the definition."""

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    of_products = 2e-3 if torch.cuda.is_available() else 2e-4  # tensor cores add 8-bit products with fewer bits
    of_layers = 2e-2 if torch.cuda.is_available() else 4e-3  # a number at the border of two codes gets the other one
    run = BACKENDS["triton"].run

    def draw(self, *shape, seed=0):
        return draw(*shape, seed=seed, dtype=self.dtype).to(self.device)

    def same(self, ours, theirs):
        assert ours.block == theirs.block
        assert torch.equal(ours.scales, theirs.scales)
        assert torch.equal(ours.codes.view(torch.uint8), theirs.codes.view(torch.uint8))

    @pytest.mark.parametrize("num_rows", [1, 128, 200])
    def test_triton_codes_of_rows(self, num_rows):
        x = self.draw(num_rows, 256) * torch.logspace(-12, 8, 256, device=self.device, dtype=self.dtype)
        x[0, :128], x[-1, 200] = 0.0, 1e-36
        for ours, theirs in zip(self.run.quantize(x, None, True), REFERENCE.quantize(x, None, True), strict=True):
            self.same(ours, theirs)

    def test_triton_codes_of_sorted_choices(self):
        x, ids = self.draw(70, 128), torch.randint(0, 5, (70, 2), generator=torch.Generator().manual_seed(1))
        _, places, _ = sort_choices(ids.to(self.device), 5)
        for ours, theirs in zip(self.run.quantize(x, places, True), REFERENCE.quantize(x, places, True), strict=True):
            self.same(ours, theirs)
        ours, nothing = self.run.quantize(x, places, False)
        self.same(ours, REFERENCE.quantize(x, places, False)[0])
        assert nothing is None

    @pytest.mark.parametrize("transpose", [False, True])
    def test_triton_codes_of_weights(self, transpose):
        joined = tuple(Float8Latent(draw(rows, 256, seed=rows).to(self.device), 1) for rows in (256, 128))
        stacked = (Float8Latent(draw(3, 256, 128).to(self.device) * 1e-3, 2),)
        for weights in (joined, stacked):
            self.same(self.run.quantize_weight(weights, transpose), REFERENCE.quantize_weight(weights, transpose))

    def test_triton_every_number_has_the_nearest_code(self):
        """All float32 numbers between two codes that matter: codes, borders between two codes, and their neighbors."""
        codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        borders = (codes[1:] + codes[:-1]) / 2
        near = [borders, torch.nextafter(borders, torch.tensor(0.0)), torch.nextafter(borders, torch.tensor(448.0))]
        values = torch.cat([codes, *near])
        x = torch.zeros(8, 128)
        x.view(-1)[: len(values)] = values
        x[:, 127] = 448.0  # scales of one
        x = torch.cat([x, -x]).to(self.device)
        self.same(self.run.quantize(x, None, False)[0], REFERENCE.quantize(x, None, False)[0])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_triton_what_is_not_finite_stays_so(self, value):
        x = self.draw(3, 256)
        x[1, 140] = value
        for codes in self.run.quantize(x, None, True):
            values = codes.dequantize(torch.float32)
            values = values if values.shape == x.shape else values.T
            assert not values[1, 140].isfinite()
            assert values[:, :128].isfinite().all()

    def test_triton_products(self):
        ends = torch.tensor([128, 128, 384], dtype=torch.int32, device=self.device)
        rows, columns = REFERENCE.quantize(self.draw(400, 256), None, True)
        gradient_columns = REFERENCE.quantize(self.draw(400, 128, seed=1), None, True)[1]
        weight = (Float8Latent(draw(3, 128, 256, seed=2).to(self.device), 1),)
        weight = REFERENCE.quantize_weight(weight, False)
        one = weight._replace(codes=weight.codes[:1], scales=weight.scales[:1])
        for groups, right, part in ((ends, weight, 384), (None, one, 400)):
            ours = self.run.multiply(rows, right, groups, torch.float32)[:part]
            assert (
                relative_error(ours, REFERENCE.multiply(rows, right, groups, torch.float32)[:part]) < self.of_products
            )
            ours = self.run.weight_gradient(gradient_columns, columns, groups)
            assert relative_error(ours, REFERENCE.weight_gradient(gradient_columns, columns, groups)) < self.of_products

    def test_triton_layers(self):
        """Both passes of a linear layer and of experts, with the functions of each backend."""
        x, weights = self.draw(150, 128), [self.draw(size, 128, seed=size).float() for size in (256, 128)]
        gate_up, down = self.draw(3, 512, 128, seed=1).float() / 11, self.draw(3, 128, 256, seed=2).float() / 16
        ids = torch.randint(0, 2, (150, 2), generator=torch.Generator().manual_seed(1)).to(self.device)
        places, results, chosen = sort_choices(ids, 3), [], self.draw(150, 2, seed=3).float()
        for functions in (self.run, REFERENCE):
            inputs = [tensor.clone().requires_grad_() for tensor in (x, *weights, x, chosen, gate_up, down)]
            y = _Linear.apply(inputs[0], functions, True, *inputs[1:3])
            z = _Experts.apply(*inputs[3:5], functions, True, places, *inputs[5:])
            gradients = self.draw(150, 384, seed=5), self.draw(150, 128, seed=6)
            results.append([y, z, *torch.autograd.grad((y, z), inputs, gradients)])
        for ours, theirs in zip(*results, strict=True):
            assert relative_error(ours.detach(), theirs.detach()) < self.of_layers
        assert not results[0][-1][2].any()

    def test_triton_gate(self):
        gate_up, gradient = self.draw(140, 512), self.draw(140, 256, seed=1)
        weights = self.draw(140, seed=2).float()
        codes = REFERENCE.gate(gate_up, weights, True)[1]
        for flag in (False, True):
            ours, theirs = (functions.gate(gate_up, weights, flag) for functions in (self.run, REFERENCE))
            assert_same_codes(ours[0], theirs[0])
            if flag:
                self.same(ours[1], theirs[1])
            ours, theirs = (
                functions.gate_backward(codes, weights, gradient, flag) for functions in (self.run, REFERENCE)
            )
            assert relative_error(ours[3], theirs[3]) < 1e-5
            for mine, other in zip(ours[:3], theirs[:3], strict=True):
                assert (mine is None) == (other is None)
                if mine is not None:
                    assert_same_codes(mine, other)
