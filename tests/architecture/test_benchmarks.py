"""Nothing in CI runs the benchmarks, so these tests import them."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import benchmarks
from benchmarks import bench_cpu
from benchmarks.harness import Row, print_rows
from openmimo.core.errors import UserError

PEERS = Path(benchmarks.__file__).parent / "peers"
MODULES = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.ispkg]
OUR_SIDES = [path.stem for path in PEERS.glob("openmimo*.py")]


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_imports(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize("name", OUR_SIDES)
def test_our_side_of_each_comparison_imports(name, monkeypatch):
    """Runs as a script in its folder, which is how a user starts it."""
    monkeypatch.syspath_prepend(PEERS)
    assert callable(importlib.import_module(name).OpenMiMo.load)


def test_without_the_peer_its_measurements_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert set(bench_cpu.AGAINST_TRANSFORMERS) & set(bench_cpu.chosen(None)) == set()
    assert "left out" in capsys.readouterr().out
    assert bench_cpu.chosen("sliding") == ["sliding"]
    with pytest.raises(UserError, match="decode is measured against transformers"):
        bench_cpu.chosen("decode")


def test_the_table_of_measurements_fits_into_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    peer, note = "F.scaled_dot_product_attention, causal", "the peer has no window [at all]"
    print_rows([Row("sliding 4096 bfloat16, forward and backward", 12345.67, 45678.9, peer, 23456.7, 20.0, note)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("12345.67" in line and "45678.90" in line and "23456.70" in line for line in lines)
    assert f"against {peer}; {note}" in " ".join(" ".join(lines).split())
