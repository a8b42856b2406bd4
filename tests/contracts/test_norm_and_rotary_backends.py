"""Every backend of the norm and of the rotation agrees with float64, forward and backward, or refuses."""

import pytest
import torch

from openmimo.kernels import native
from openmimo.kernels.operations import (
    ADD_NORM,
    NORM,
    ROTARY,
    NormNeed,
    RotaryNeed,
    add_rms_norm,
    apply_rotary,
    rms_norm,
    rotary_table,
)

NORMS, ROTATIONS, SUMS = dict(NORM.backends()), dict(ROTARY.backends()), dict(ADD_NORM.backends())
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 4e-3}


def inside_poison(tensor):
    """Copies the numbers between NaNs, so that a read out of bounds makes the comparison fail."""
    around = torch.full((tensor.numel() + 128,), float("nan"), dtype=tensor.dtype)
    return around[64:-64].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("shape", [(1, 128), (5, 7), (3, 4, 48), (2, 0), (0, 16)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", NORMS)
@torch.inference_mode()
def test_a_norm_in_inference_is_float64_or_refuses(name, dtype, shape):
    x, weight = (inside_poison(torch.randn(size).to(dtype)) for size in (shape, shape[-1]))
    if reason := NORMS[name].refuse(NormNeed(x.numel(), dtype, False, True, True)):
        pytest.skip(reason)
    wide = x.double()
    exact = wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    ours = NORMS[name].run(x, weight, 1e-5)
    assert ours.dtype == dtype
    assert torch.allclose(ours.double(), exact, rtol=2 * TOLERANCES[dtype], atol=TOLERANCES[dtype])


@torch.inference_mode()
def test_a_norm_of_strided_rows_and_strided_weights():
    x, weight = torch.randn(6, 40)[::2, 4:36], torch.randn(64)[::2]
    assert torch.allclose(rms_norm(x, weight, 1e-5), rms_norm(x.double(), weight.double(), 1e-5).float(), atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gradients_of_a_norm(name, dtype):
    if reason := NORMS[name].refuse(NormNeed(31 * 40, dtype, True, True, True)):
        pytest.skip(reason)
    x, weight = (torch.randn(size, dtype=dtype, requires_grad=True) for size in ((31, 40), (40,)))
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + 1e-5) * wide[1]
    upstream = torch.randn(31, 40, dtype=torch.float64)
    ours = torch.autograd.grad(NORMS[name].run(x, weight, 1e-5), (x, weight), upstream.to(dtype))
    for mine, theirs in zip(ours, torch.autograd.grad(exact, wide, upstream), strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 10 * TOLERANCES[dtype]


@pytest.mark.parametrize("shape", [(1, 128), (5, 7), (3, 4, 48), (0, 16)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SUMS)
@torch.inference_mode()
def test_a_sum_and_its_norm_are_the_sum_and_the_norm_or_refused(name, dtype, shape):
    x, added, weight = (inside_poison(torch.randn(size).to(dtype)) for size in (shape, shape, shape[-1]))
    if reason := SUMS[name].refuse(NormNeed(x.numel(), dtype, False, True, True)):
        pytest.skip(reason)
    total, ours = SUMS[name].run(x, added, weight, 1e-5)
    assert torch.equal(total, x + added)
    wide = total.double()
    exact = wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert ours.dtype == dtype
    assert torch.allclose(ours.double(), exact, rtol=2 * TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_a_sum_and_its_norm_have_gradients_and_broadcast_summands():
    x, added, weight = (torch.randn(size, requires_grad=True) for size in ((6, 40), (1, 40), (40,)))
    total, normalized = add_rms_norm(x, added, weight, 1e-5)
    expected = rms_norm(x + added, weight, 1e-5)
    assert torch.equal(total, x + added)
    assert torch.equal(normalized, expected)
    for ours, theirs in zip(
        torch.autograd.grad(normalized.square().sum(), (x, added, weight)),
        torch.autograd.grad(expected.square().sum(), (x, added, weight)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rotary_dim", [2, 16, 24])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ROTATIONS)
@torch.inference_mode()
def test_a_rotation_of_strided_heads_is_float64_or_refuses(name, dtype, rotary_dim):
    x_THK = inside_poison(torch.randn(5, 200).to(dtype))[:, 3 : 3 + 6 * 24].view(5, 6, 24)
    cos, sin = rotary_table(torch.tensor([0, 1, 7, 300, 5]), rotary_dim, 1e4, dtype)
    if reason := ROTATIONS[name].refuse(RotaryNeed(x_THK.numel(), dtype, False, True, True)):
        pytest.skip(reason)
    half, wide = rotary_dim // 2, x_THK.double()
    c, s = (table.double()[:, None, :half] for table in (cos, sin))
    first, second = wide[..., :half], wide[..., half:rotary_dim]
    exact = torch.cat([first * c - second * s, second * c + first * s, wide[..., rotary_dim:]], dim=-1)
    ours = ROTATIONS[name].run(x_THK, cos, sin)
    assert ours.dtype == dtype
    assert torch.allclose(ours.double(), exact, rtol=2 * TOLERANCES[dtype], atol=2 * TOLERANCES[dtype])
    assert torch.equal(ours[..., rotary_dim:], x_THK[..., rotary_dim:])


@pytest.mark.parametrize("name", ROTATIONS)
def test_the_gradient_of_a_rotation(name):
    if reason := ROTATIONS[name].refuse(RotaryNeed(3 * 2 * 12, torch.float64, True, True, True)):
        pytest.skip(reason)
    cos, sin = rotary_table(torch.tensor([0, 3, 100]), 8, 100.0, torch.float64)
    x = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: ROTATIONS[name].run(value, cos, sin), (x,))


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
def test_decoding_on_a_cpu_is_native():
    assert NORM.choose(NormNeed(4096, torch.bfloat16, False, True, True))[0] == "native"
    assert ROTARY.choose(RotaryNeed(4096, torch.bfloat16, False, True, True))[0] == "native"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_rms_norm(dtype, tolerance):
    x64, w64 = torch.randn(31, 40, dtype=torch.float64), 1 + 0.2 * torch.randn(40, dtype=torch.float64)
    x, w = x64.to(dtype).requires_grad_(), w64.to(dtype).requires_grad_()
    xe, we = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    out = rms_norm(x, w, 1e-5)
    expected = xe * torch.rsqrt(xe.square().mean(-1, keepdim=True) + 1e-5) * we
    assert out.dtype == dtype
    assert (out.double() - expected).norm() / expected.norm() < tolerance
    upstream = torch.randn(31, 40, dtype=torch.float64)
    ours = torch.autograd.grad(out, (x, w), upstream.to(dtype))
    theirs = torch.autograd.grad(expected, (xe, we), upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_rms_norm_keeps_float32_weights_over_bfloat16_activations():
    x, w = torch.randn(5, 8).bfloat16(), torch.ones(8, requires_grad=True)
    out = rms_norm(x, w, 1e-5)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert w.grad.dtype == torch.float32


def test_bfloat16_gradients_are_computed_in_float32():
    """A gradient parallel to x only changes the scale, which the norm removes: the two terms of the gradient cancel."""
    x = torch.randn(50, 64).bfloat16().requires_grad_()
    weight = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    rms_norm(x, weight, 1e-12).backward(x.detach())
    assert x.grad.abs().max() < 1e-5
    expected = (x.double().square() * torch.rsqrt(x.double().square().mean(-1, keepdim=True))).sum(0)
    assert (weight.grad.double() / expected - 1).abs().max() < 2**-8


def test_published_frequencies():
    """Expected values are computed from the published bases: rotations per position of the 64 rotated dims."""
    for theta, checks in ((5e6, {1: 0.617528737, 31: 3.23871546e-7}), (1e4, {1: 0.749894202, 31: 1.3335215e-4})):
        _, sin = rotary_table(torch.tensor([1]), 64, theta, torch.float64)
        for index, frequency in checks.items():
            assert sin[0, index].arcsin().item() == pytest.approx(frequency, rel=1e-6)


def test_rotation_turns_pairs_and_leaves_the_rest():
    positions = torch.tensor([0, 3, 100])
    cos, sin = rotary_table(positions, 8, 100.0, torch.float64)
    x = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    out = apply_rotary(x, cos, sin)
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = torch.tensor(position * 100.0 ** (-2 * i / 8), dtype=torch.float64)
            a, b = x[t, :, i], x[t, :, i + 4]
            assert torch.allclose(out[t, :, i], a * angle.cos() - b * angle.sin())
            assert torch.allclose(out[t, :, i + 4], b * angle.cos() + a * angle.sin())
    assert torch.equal(out[..., 8:], x[..., 8:])
    assert torch.autograd.gradcheck(lambda value: apply_rotary(value, cos, sin), (x,))


def test_attention_logits_depend_on_distance_alone():
    x, y = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)

    def logit(i, j):
        q = apply_rotary(x, *rotary_table(torch.tensor([i]), 8, 1e4, torch.float64))
        k = apply_rotary(y, *rotary_table(torch.tensor([j]), 8, 1e4, torch.float64))
        return (q * k).sum()

    assert torch.allclose(logit(7, 3), logit(1007, 1003), atol=1e-9)
