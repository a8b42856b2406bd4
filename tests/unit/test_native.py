"""The native library is built once and cached; without a compiler, the package works without it."""

import subprocess
import sys
import threading

import pytest

from openmimo.kernels import native

needs_library = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")

DECODE = """
import torch
from openmimo.kernels import native
from openmimo.kernels.operations import apply_experts
from openmimo.kernels.operations import linear
from openmimo.kernels.operations import rms_norm
assert native.library() is None
with torch.inference_mode():
    x = linear(rms_norm(torch.ones(1, 8), torch.ones(8), 1e-6), torch.ones(8, 8))
    apply_experts(x, torch.tensor([[1]]), torch.ones(1, 1), torch.ones(2, 6, 8), torch.ones(2, 8, 3))
print(x.sum().item())
"""


def decode_without(monkeypatch, tmp_path, **environment):
    """Runs the operations in a new process and checks their result. Returns the warnings."""
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", DECODE], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(64, rel=1e-4)
    return done.stderr


def test_it_can_be_turned_off(monkeypatch, tmp_path):
    assert "Warning" not in decode_without(monkeypatch, tmp_path, OPENMIMO_NATIVE="0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", ["/bin/false", pytest.param("/no/such/compiler", marks=pytest.mark.slow)])
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
