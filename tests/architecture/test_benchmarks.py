"""Benchmarks are run by hand, so what breaks their imports would show late."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import benchmarks

PEERS = Path(benchmarks.__file__).parent / "peers"
MODULES = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.ispkg]
OUR_SIDES = [path.stem for path in PEERS.glob("openmimo*.py")]


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_imports(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize("name", OUR_SIDES)
def test_our_side_of_each_comparison_imports(name, monkeypatch):
    """As a script in its folder, the way it is started."""
    monkeypatch.syspath_prepend(PEERS)
    assert callable(importlib.import_module(name).OpenMiMo.load)
