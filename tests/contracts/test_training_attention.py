"""Attention with gradients in Triton is the float64 reference; in Triton's interpreter, where it is installed.

See `make interpret`. Kernels for a GPU have other tiles than float32 ones, so those run here as well.
"""

from dataclasses import replace

import pytest
import torch

from openmimo.kernels.attention import ATTENTION, AttentionNeed, AttentionOut

# lengths, query heads, key/value heads, key dim, value dim, window, sink
CALLS = {
    "dims of flash": ((270,), 8, 1, 192, 128, 128, True),
    "group of one": ((90, 40), 2, 2, 24, 16, 33, True),
    "group of four, documents of one token": ((1, 1, 70, 1, 37, 5, 64, 1), 8, 2, 24, 16, 20, True),
    "group of sixteen": ((101, 30), 16, 1, 48, 32, 17, True),
    "group of three": ((50, 61), 6, 2, 12, 20, 40, True),
    "window beyond the documents": ((7,) * 20, 4, 1, 16, 16, 100, False),
    "window of one": ((70,), 2, 1, 8, 12, 1, True),
    "full": ((150,), 8, 1, 24, 16, None, False),
    "full with sinks, dims of flash": ((65, 1, 14), 16, 1, 192, 128, None, True),
    "full, ragged": ((1, 100, 33, 1, 1, 64, 2), 4, 2, 24, 16, None, False),
}


def call_of(name, dtype=torch.float32):
    """The need of a call and its inputs; the sinks are as large as the largest logits."""
    lengths, N, G, K, V, window, has_sink = CALLS[name]
    generator, T = torch.Generator().manual_seed(0), sum(lengths)
    shapes = [(T, N, K), (T, G, K), (T, G, V), *([(N,)] if has_sink else [])]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if has_sink:
        tensors[3] *= 4
    need = AttentionNeed(lengths, lengths, N, G, K, V, window, has_sink, True, dtype, True)
    return need, [x.requires_grad_() for x in tensors] + [None] * (not has_sink)


def gradients(run, need, tensors):
    """The output and the gradients of a computation."""
    out = run(*tensors, need=need, scale=need.key_dim**-0.5).out_TNV
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x for x in tensors if x is not None], weights)]


def expected(need, tensors):
    """The same of the float64 reference."""
    exact = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    return gradients(dict(ATTENTION.backends())["reference"].run, replace(need, dtype=torch.float64), exact)


@pytest.fixture
def run():
    need, _ = call_of("full")
    backend = dict(ATTENTION.backends())["triton_training"]
    if reason := backend.refuse(need):
        pytest.skip(reason)
    return backend.run


@pytest.mark.parametrize("name", CALLS)
def test_triton_training_is_the_reference(name, run):
    need, tensors = call_of(name)
    for ours, theirs in zip(gradients(run, need, tensors), expected(need, tensors), strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{"descriptors": True}, {"descriptors": True, "unrolled": True, "block": 16}, {"rows": 128}], ids=str
)
@pytest.mark.parametrize("name", ["group of four, documents of one token", "group of sixteen", "full, ragged"])
def test_triton_tilings_of_a_gpu_are_the_reference(name, options, run):
    """Tensor descriptors, loops without a loop, and several blocks of a window."""
    from openmimo.kernels.attention import _training as kernels

    def planned(q, k, v, sink, *, need, scale):
        plan = kernels.FLOAT32_PLAN
        parts = {part: replace(getattr(plan, part), **options) for part in ("forward", "queries", "keys")}
        documents = kernels.documents_of(need.query_lengths, q.device)
        window = need.window_keys
        out = kernels.attend_pack(
            q, k, v, sink, documents, scale=scale, window_keys=window, plan=replace(plan, **parts)
        )
        return AttentionOut(out)

    need, tensors = call_of(name)
    for ours, theirs in zip(gradients(planned, need, tensors), expected(need, tensors), strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["dims of flash", "group of three", "full, ragged"])
def test_triton_plans_of_a_gpu_are_the_reference_in_float16(name, run):
    """The interpreter has no bfloat16; tiles, descriptors and loops are those of a GPU."""
    need, tensors = call_of(name, torch.float16)
    exact = expected(need, tensors)
    for ours, theirs in zip(gradients(run, need, tensors), exact, strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < 3e-3


def test_triton_training_has_the_same_bits_twice(run):
    need, tensors = call_of("group of four, documents of one token")
    for one, other in zip(*(gradients(run, need, tensors) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_triton_training_reads_heads_of_a_joined_projection(run):
    need, (q, k, v, sink) = call_of("group of three")
    N, G, K, V = need.num_heads, need.num_kv_heads, need.key_dim, need.value_dim
    joined = torch.cat([x.detach().flatten(1) for x in (q, k, v)], dim=1).requires_grad_()
    parts = joined.split([N * K, G * K, G * V], dim=1)
    heads = [part.unflatten(1, (count, -1)) for part, count in zip(parts, (N, G, G), strict=True)]
    theirs = expected(need, [q, k, v, sink])
    out = run(*heads, sink, need=need, scale=K**-0.5).out_TNV
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).float()
    (ours,) = torch.autograd.grad(out, [joined], weights)
    assert torch.allclose(ours.double(), torch.cat([x.flatten(1) for x in theirs[1:4]], dim=1), rtol=1e-4, atol=2e-5)


def test_triton_training_refuses_what_it_does_not_compute():
    need, _ = call_of("full")
    refuse = dict(ATTENTION.backends())["triton_training"].refuse
    assert "scores" in refuse(replace(need, score_block=4))
    assert "blocks" in refuse(replace(need, chosen_block=4))
    assert ATTENTION.choose(replace(need, on_cpu=True))[0] != "triton_training"
