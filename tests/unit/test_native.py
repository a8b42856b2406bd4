"""The native library: built once, kept, and done without where it cannot be had; its small kernels against torch."""

import subprocess
import sys
import threading

import pytest
import torch

from openmimo.kernels import native, router
from openmimo.kernels.norm import rms_norm
from openmimo.kernels.rotary import apply_rotary, rotary_table
from openmimo.model.config import MoEConfig
from openmimo.model.context import PackedContext
from openmimo.model.moe import Router

needs_library = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
DTYPES = {"float32": (torch.float32, 1e-6), "bfloat16": (torch.bfloat16, 4e-3)}

DECODE = """
import torch
from openmimo.kernels import native
from openmimo.kernels.experts import apply_experts
from openmimo.kernels.linear import linear
from openmimo.kernels.norm import rms_norm
assert native.library() is None
with torch.inference_mode():
    x = linear(rms_norm(torch.ones(1, 8), torch.ones(8), 1e-6), torch.ones(8, 8))
    apply_experts(x, torch.tensor([[1]]), torch.ones(1, 1), torch.ones(2, 6, 8), torch.ones(2, 8, 3))
print(x.sum().item())
"""


def decode_without(monkeypatch, tmp_path, **environment):
    """What a fresh process prints, and its warnings."""
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", DECODE], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(64, rel=1e-4)
    return done.stderr


def test_it_can_be_turned_off(monkeypatch, tmp_path):
    assert "Warning" not in decode_without(monkeypatch, tmp_path, OPENMIMO_NATIVE="0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_a_compiler_that_fails_is_said_once_and_done_without(monkeypatch, tmp_path, compiler):
    warnings = decode_without(monkeypatch, tmp_path, CC=compiler, OPENMIMO_NATIVE="1")
    assert warnings.count("UserWarning") == 1
    assert compiler in warnings
    assert "Install a C compiler" in warnings


@needs_library
def test_a_source_that_does_not_compile_names_the_compilers_last_line(monkeypatch, tmp_path):
    (tmp_path / "broken.c").write_text("int broken(void) { return nothing; }\n")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    with pytest.warns(UserWarning, match="C kernels are not used"):
        assert native.library() is None
    assert not list((tmp_path / "cache").rglob("*.so"))
    native.library.cache_clear()


@needs_library
def test_it_is_built_once_and_again_when_a_source_changes(monkeypatch, tmp_path):
    (tmp_path / "one.c").write_text("int one(void) { return 1; }\n")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path / "cache"))
    first = native.build(native.find_compiler())
    built = first.stat().st_mtime_ns
    assert native.build(native.find_compiler()) == first
    assert first.stat().st_mtime_ns == built
    (tmp_path / "one.c").write_text("int one(void) { return 2; }\n")
    assert native.build(native.find_compiler()) != first


@pytest.mark.slow
@needs_library
def test_several_may_build_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path))
    built = []
    threads = [threading.Thread(target=lambda: built.append(native.build(native.find_compiler()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 3
    assert [path.name for path in (tmp_path / "native").iterdir()] == [built[0].name]


@pytest.mark.parametrize("shape", [(1, 128), (5, 7), (3, 4, 48), (2, 0), (0, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_rms_norm_is_float64s(dtype, shape):
    dtype, tolerance = DTYPES[dtype]
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    exact = wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    ours = rms_norm(x, weight, 1e-5)
    assert ours.dtype == dtype
    assert torch.allclose(ours.double(), exact, rtol=2 * tolerance, atol=tolerance)


@pytest.mark.parametrize("rotary_dim", [2, 16, 24])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_rotary_of_strided_heads_is_float64s(dtype, rotary_dim):
    dtype, tolerance = DTYPES[dtype]
    x_THK = torch.randn(5, 200).to(dtype)[:, 3 : 3 + 6 * 24].view(5, 6, 24)
    cos, sin = rotary_table(torch.tensor([0, 1, 7, 300, 5]), rotary_dim, 1e4, dtype)
    exact = apply_rotary(x_THK.double(), cos.double(), sin.double())
    ours = apply_rotary(x_THK, cos, sin)
    assert torch.allclose(ours.double(), exact, rtol=2 * tolerance, atol=2 * tolerance)
    assert torch.equal(ours[..., rotary_dim:], x_THK[..., rotary_dim:])


@needs_library
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str)
@pytest.mark.parametrize("moe", [MoEConfig(9, 3, 8), MoEConfig(8, 1, 8, normalize_weights=False, routed_scale=2.5)])
@torch.inference_mode()
def test_router_chooses_as_its_definition_does(monkeypatch, moe, dtypes):
    x_dtype, weight_dtype = (DTYPES[name][0] for name in dtypes)
    layer = Router(40, moe, index=0)
    layer.weight.copy_(torch.randn(moe.num_experts, 40) * 0.2)
    layer.e_score_correction_bias.copy_(torch.randn(moe.num_experts) * 0.3)
    layer.to(weight_dtype)
    x_TD, context = torch.randn(router.MAX_TOKENS, 40).to(x_dtype), PackedContext((router.MAX_TOKENS,))
    assert router.serves(x_TD, layer.weight)
    ids, weights = layer(x_TD, context)
    alone = [layer(row[None], context) for row in x_TD]
    assert torch.equal(ids, torch.cat([pair[0] for pair in alone]))
    assert torch.equal(weights, torch.cat([pair[1] for pair in alone]))
    monkeypatch.setattr(router, "serves", lambda x_TD, weight_ED: False)
    defined_ids, defined_weights = layer(x_TD, context)
    assert torch.equal(ids, defined_ids)
    assert torch.allclose(weights, defined_weights, rtol=1e-5)
