"""All operations are dispatched alike: a folder with a Need, a DISPATCHER, a reference and an environment variable."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import openmimo.kernels
from openmimo.kernels.dispatch import Dispatcher

ROOT = Path(openmimo.kernels.__file__).parent
PACKAGES = [module.name for module in pkgutil.walk_packages([str(ROOT)], "openmimo.kernels.") if module.ispkg]
OPERATIONS = [name for name in PACKAGES if hasattr(importlib.import_module(name), "DISPATCHER")]
NO_OPERATIONS = ["openmimo.kernels.native"]


def folder_of(operation):
    return ROOT.joinpath(*operation.split(".")[2:])


def test_every_folder_is_an_operation():
    assert set(PACKAGES) == {*OPERATIONS, *NO_OPERATIONS}
    assert {path.name for path in ROOT.glob("*.py")} <= {"__init__.py", "dispatch.py", "weights.py"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_a_reference_that_serves_everything_and_a_variable(operation):
    dispatcher = importlib.import_module(operation).DISPATCHER
    assert isinstance(dispatcher, Dispatcher)
    assert dispatcher.variable == f"OPENMIMO_{operation.rpartition('.')[2].upper()}"
    assert dispatcher.backends()[-1][0] == "reference"
    assert dispatcher.backends()[-1][1].priority == 0
    assert dispatcher.backends()[-1][1].refuse(None) is None  # the function does not read the need
    assert all(backend.priority > 0 for name, backend in dispatcher.backends() if name != "reference")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_call_leaves_the_choice_to_the_dispatcher(operation):
    """No `__init__` of an operation chooses by the device or by the C library: both are fields of the need."""
    tree = ast.parse((folder_of(operation) / "__init__.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert "native" not in imported
    tests = [node.test for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp, ast.While))]
    asked = {node.attr for test in tests for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    assert not asked & {"is_cpu", "device", "is_cuda"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_a_contract_test(operation):
    contracts = Path(__file__).parents[1] / "contracts"
    assert any(f"{operation} import" in path.read_text() for path in contracts.glob("test_*.py"))
