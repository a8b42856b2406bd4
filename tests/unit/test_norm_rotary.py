"""The small kernels against their definitions in double precision, forward and backward."""

import pytest
import torch

from openmimo.kernels.norm import rms_norm
from openmimo.kernels.rotary import apply_rotary, rotary_table


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
    """A gradient along x changes nothing but the scale, which the norm removes: its two terms cancel."""
    x = torch.randn(50, 64).bfloat16().requires_grad_()
    weight = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    rms_norm(x, weight, 1e-12).backward(x.detach())
    assert x.grad.abs().max() < 1e-5
    expected = (x.double().square() * torch.rsqrt(x.double().square().mean(-1, keepdim=True))).sum(0)
    assert (weight.grad.double() / expected - 1).abs().max() < 2**-8


def test_published_frequencies():
    """Check values of the published bases: rotations per position of the 64 rotated dims."""
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
