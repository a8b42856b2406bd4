"""Attention with gradients in Triton on an accelerator, in bfloat16, against float64 and the error of other backends.

`pytest -m gpu` runs these tests on a machine with an accelerator.
"""

from dataclasses import replace

import pytest
import torch

from openmimo.core.errors import ConfigError
from openmimo.kernels.attention import ATTENTION, AttentionNeed, sdpa
from openmimo.runtime.device import resolve_device

pytestmark = pytest.mark.gpu

# lengths, query heads, key/value heads, key dim, value dim, window
CALLS = {
    "sliding layer of flash": ((1500, 1, 64, 2, 300, 129), 64, 8, 192, 128, 128),
    "full layer of flash": ((900, 1, 64, 2, 300, 129), 64, 4, 192, 128, None),
    "group of one": ((200, 77), 4, 4, 192, 128, 128),
    "group of four": ((16, 333, 1), 8, 2, 64, 64, 33),
    "group of sixteen": ((250, 90), 32, 2, 48, 32, 100),
    "group of three": ((250, 90), 6, 2, 24, 20, 20),
}


@pytest.fixture(scope="module")
def device():
    found = resolve_device("auto")
    if found.type == "cpu":
        pytest.skip("no accelerator")
    return found


def call_of(name, device):
    """The need and the inputs; sinks are as large as the largest logits."""
    lengths, N, G, K, V, window = CALLS[name]
    generator, T = torch.Generator(device).manual_seed(0), sum(lengths)
    shapes = [(T, N, K), (T, G, K), (T, G, V), *([(N,)] if window else [])]
    tensors = [torch.randn(shape, device=device, generator=generator).bfloat16() for shape in shapes]
    need = AttentionNeed(lengths, lengths, N, G, K, V, window, window is not None, True, torch.bfloat16, False)
    if window:
        tensors[3] = 4 * tensors[3].float()
    return need, tensors


def gradients(name, need, tensors, dtype=None):
    """The output and the gradients of a backend."""
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in tensors]
    sink = leaves[3] if need.has_sink else None
    backend = dict(ATTENTION.backends())[name]
    out = backend.run(*leaves[:3], sink, need=need, scale=need.key_dim**-0.5).out_TNV
    generator = torch.Generator(out.device).manual_seed(1)
    upstream = torch.randn(out.shape, device=out.device, generator=generator).bfloat16().to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def errors(ours, exact):
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(ours, exact, strict=True)]


@pytest.mark.parametrize("name", CALLS)
def test_errors_are_those_of_other_backends(device, name):
    need, tensors = call_of(name, device)
    exact = gradients("reference", replace(need, dtype=torch.float64), tensors, torch.float64)
    peer = "banded" if need.window_keys else "blocked"
    ours, theirs = (errors(gradients(backend, need, tensors), exact) for backend in ("triton_training", peer))
    for part, one, other in zip(("output", "q", "k", "v", "sink"), ours, theirs, strict=False):
        assert one < 1.25 * other + 1e-3, f"{part}: {one:.1e}, {peer} has {other:.1e}"


@pytest.mark.parametrize("name", ["sliding layer of flash", "full layer of flash"])
def test_two_runs_have_the_same_bits(device, name):
    need, tensors = call_of(name, device)
    for one, other in zip(*(gradients("triton_training", need, tensors) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["sliding layer of flash", "full layer of flash"])
def test_a_document_does_not_depend_on_those_around_it(device, name):
    """The tiles of another pack begin at other tokens, so the bits may differ and the errors may not."""
    need, tensors = call_of(name, device)
    lengths = need.query_lengths
    last = replace(need, query_lengths=lengths[-1:], key_lengths=lengths[-1:])
    alone = [x[-lengths[-1] :] if x.ndim > 1 else x for x in tensors]
    whole, part = gradients("triton_training", need, tensors)[0], gradients("triton_training", last, alone)[0]
    assert errors([part], [whole[-lengths[-1] :].double()])[0] < 1e-2


def test_memory_is_that_of_the_results(device):
    need, tensors = call_of("sliding layer of flash", device)
    gradients("triton_training", need, tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = gradients("triton_training", need, tensors)
    peak = torch.cuda.max_memory_allocated() - before
    needed = sum(x.numel() * x.element_size() for x in results)
    upstream = results[0].numel() * (4 + 2)  # drawn in float32
    assert peak < 1.2 * (needed + upstream)


def test_float32_and_long_unfused_calls_are_refused(device):
    need, tensors = call_of("sliding layer of flash", device)
    refuse = dict(ATTENTION.backends())["triton_training"].refuse
    assert refuse(need) is None and "half precision" in refuse(replace(need, dtype=torch.float32))
    lengths = (65,)
    q, k, v = (torch.randn(65, heads, 300, device=device).bfloat16() for heads in (2, 1, 1))
    odd = replace(need, query_lengths=lengths, key_lengths=lengths, num_heads=2, num_kv_heads=1, key_dim=300)
    with pytest.raises(ConfigError, match="attention of 65 tokens"):
        sdpa.run(q.double(), k.double(), v.double(), None, need=odd, scale=1.0)
