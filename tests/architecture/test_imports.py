"""Static import closures stay small, and there are no import cycles.

All imports in the source count, also those inside functions and under TYPE_CHECKING. Empty files do not count.
"""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in (ROOT / "openmimo").rglob("*.py")}


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """Returns the modules of the package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return frozenset(found & set(FILES))


def closure_of(module: str) -> set[str]:
    """Returns the module and every module that it imports, directly or through others."""
    found, waiting = {module}, [module]
    while waiting:
        new = imports_of(waiting.pop()) - found
        found |= new
        waiting += new
    return {name for name in found if FILES[name].read_text().strip()}


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter({module: imports_of(module) for module in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("module", "most"), [("openmimo.train.pretrain", 40), ("openmimo.engine.llm", 40), ("openmimo.rl.run", 80)]
)
def test_one_path_needs_few_files(module, most):
    closure = closure_of(module)
    assert len(closure) <= most, f"{module} needs {len(closure)} files: {', '.join(sorted(closure))}"
