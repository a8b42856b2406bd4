"""Rules about the source: allowed imports between folders, light imports, and names that only some files may use."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "openmimo"

# Imports go downwards only; folders of one level never import each other (docs/decisions, ARCHITECTURE.md).
LEVELS = {
    "core": 0, "runtime": 1, "arguments": 1, "short_help": 1, "kernels": 2, "data": 2, "model": 3, "parallel": 4,
    "train": 5, "engine": 5, "rl": 6, "evals": 6, "demo": 7, "own_data": 7, "audio_commands": 8,
    "cli": 9,
}  # fmt: skip
TORCH_FREE = ["openmimo", "openmimo.cli", "openmimo.train.config", "openmimo.model.config",
              "openmimo.model.presets", "openmimo.model.audio.config", "openmimo.model.audio.language_config",
              "openmimo.train.audio.config", "openmimo.model.hf_config", "openmimo.data.config",
              "openmimo.evals.config", "openmimo.demo.config", "openmimo.engine.config",
              "openmimo.engine.server.config", "openmimo.rl.config", "openmimo.rl.scheduling.scheduler",
              "openmimo.rl.algorithm", "openmimo.data.task", "openmimo.runtime.sandbox",
              "openmimo.data.audio.config", "openmimo.demo.audio.config"]  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """Returns the syntax tree of a file, which several rules read."""
    return ast.parse(path.read_text())


def imports_of(path: Path) -> set[str]:
    """Returns the dotted names of all modules that a file imports, at module level or inside functions."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for module in imports_of(path):
        assert module.split(".")[0] not in ("recipes", "tests", "benchmarks"), f"{path} imports {module}"
        if not module.startswith("openmimo.") or layer_of(module) == own:
            continue
        assert LEVELS[layer_of(module)] < LEVELS[own], f"{path.relative_to(ROOT)} ({own}) imports {module}"


def test_recipes_import_configs_only():
    for path in (ROOT / "recipes").glob("*.py"):
        for module in imports_of(path):
            is_config = module.startswith("openmimo.") and ".config" in module
            assert is_config or not module.startswith("openmimo"), f"{path.name} imports {module}"


def test_every_folder_has_a_level():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert folders <= set(LEVELS)


def test_core_configs_and_recipes_import_without_torch():
    recipes = [f"recipes.{path.stem}" for path in (ROOT / "recipes").glob("*.py")]
    core = [f"openmimo.core.{path.stem}" for path in (PACKAGE / "core").glob("*.py")]
    load = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code = load + "assert 'torch' not in sys.modules"
    modules = [*TORCH_FREE, *recipes, *core]
    subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, check=True)


def test_the_accelerator_is_named_in_one_file():
    named = [str(path.relative_to(ROOT)) for path in FILES if re.search(r"\bcuda\b", path.read_text())]
    assert named == ["openmimo/runtime/device.py"]


def test_no_landfill_modules():
    banned = {"utils", "util", "misc", "common", "helpers", "helper", "base", "manager"}
    assert not [path for path in FILES if path.stem in banned or banned & set(path.relative_to(ROOT).parts)]


def test_public_things_have_docstrings():
    trees = {path: tree_of(path) for path in FILES}
    documented = documented_methods(trees.values())
    missing = []
    for path, tree in trees.items():
        if path.name != "__init__.py" or path.read_text().strip():
            missing += [] if ast.get_docstring(tree) else [str(path)]
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                missing += [] if ast.get_docstring(node) else [f"{path}:{node.lineno} {node.name}"]
                methods = node.body if isinstance(node, ast.ClassDef) else []
                missing += [
                    f"{path}:{method.lineno} {node.name}.{method.name}"
                    for method in methods
                    if isinstance(method, ast.FunctionDef)
                    and not method.name.startswith("_")
                    and not ast.get_docstring(method)
                    and not documented.intersection(
                        (name, method.name, len(method.args.args)) for name in ["", *map(name_of, node.bases)]
                    )
                    and not (len(method.args.args) == 2 and method.args.args[0].arg == "ctx")
                    and method.args.args[:1] != []
                    and method.args.args[0].arg != "ctx"
                ]
    assert not missing, "\n".join(missing)


def documented_methods(trees: Iterable[ast.Module]) -> set[tuple[str, str, int]]:
    """Returns (class, name, number of arguments) of methods whose docstring is on another class.

    The other class is a base class of the package. Protocols are structural, so a method of any Protocol or abstract
    class also counts, with "" as its class.
    """
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    documented = set()
    for node in classes:
        names = [node.name, ""] if {"Protocol", "ABC"} & {name_of(base) for base in node.bases} else [node.name]
        for method in node.body:
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(method):
                documented |= {(name, method.name, len(method.args.args)) for name in names}
    return documented


def name_of(base: ast.expr) -> str:
    return ast.unparse(base).split("[")[0].split(".")[-1]


def test_functions_fit_a_screen():
    long = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 70:
                long.append(f"{path}:{node.lineno} {node.name}")
    assert not long, "\n".join(long)


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\s*make (\w+)", readme, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    from openmimo.cli import VERBS

    verbs = re.findall(r"^\s*(?:\.venv/bin/)?openmimo (\w+)", readme, flags=re.MULTILINE)
    assert verbs
    assert set(verbs) <= set(VERBS)


def test_files_named_in_the_paper_map_exist():
    named = re.findall(
        r"`((?:openmimo|recipes|tests|benchmarks|docs)/[\w/.]+)`", (ROOT / "docs" / "paper.md").read_text()
    )
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
