"""All operations are dispatched alike: a folder of backends with a reference, and an environment variable."""

import ast
import functools
import pkgutil
from pathlib import Path

import pytest

import openmimo.kernels
from openmimo.kernels import attention, operations
from openmimo.kernels.dispatch import Dispatcher

ROOT = Path(openmimo.kernels.__file__).parent
PACKAGES = {module.name for module in pkgutil.walk_packages([str(ROOT)], "openmimo.kernels.") if module.ispkg}
DISPATCHERS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": value
    for module in (attention, operations)
    for name, value in vars(module).items()
    if isinstance(value, Dispatcher)
}


def test_every_folder_is_an_operation():
    assert {*(dispatcher.package for dispatcher in DISPATCHERS.values()), "openmimo.kernels.native"} == PACKAGES
    files = {path.name for path in ROOT.glob("*.py")}
    assert files == {"__init__.py", "dispatch.py", "operations.py", "weights.py"}


@pytest.mark.parametrize("name", DISPATCHERS)
def test_an_operation_has_a_reference_that_serves_everything_and_a_variable(name):
    dispatcher = DISPATCHERS[name]
    assert dispatcher.variable == f"OPENMIMO_{dispatcher.package.rpartition('.')[2].upper()}"
    assert name.rpartition(".")[2] == dispatcher.variable.removeprefix("OPENMIMO_")
    assert dispatcher.backends()[-1][0] == "reference"
    assert dispatcher.backends()[-1][1].priority == 0
    assert dispatcher.backends()[-1][1].refuse(None) is None  # the function does not read the need
    assert all(backend.priority > 0 for name, backend in dispatcher.backends() if name != "reference")


@pytest.mark.parametrize("module", [attention, operations], ids=["attention", "operations"])
def test_the_call_leaves_the_choice_to_the_dispatcher(module):
    """No `__init__` of an operation chooses by the device or by the C library: both are fields of the need."""
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert "native" not in imported
    tests = [node.test for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp, ast.While))]
    asked = {node.attr for test in tests for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    assert not asked & {"is_cpu", "device", "is_cuda"}


@functools.cache
def names_in_contract_tests() -> set[tuple[str, str]]:
    """Returns the modules and names that contract tests import."""
    nodes = [
        node
        for path in (Path(__file__).parents[1] / "contracts").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    ]
    return {(node.module, alias.name) for node in nodes for alias in node.names}


@pytest.mark.parametrize("name", DISPATCHERS)
def test_an_operation_has_a_contract_test(name):
    module, _, dispatcher = name.rpartition(".")
    assert (f"openmimo.kernels.{module}", dispatcher) in names_in_contract_tests()
