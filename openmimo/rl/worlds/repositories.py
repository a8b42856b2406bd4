"""Generated small repositories with one bug, an issue that reports it, and hidden tests that detect it (section 4.3.2).

No history reveals the fix: there is no `.git` and no backup, and all files have one fixed time (appendix B). The hidden
tests are calls with their expected values; they are not part of the repository.
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmimo.data.tasks._graded_tests import Groups, difficulty_groups
from openmimo.rl.worlds.functions import TEMPLATES, Template
from openmimo.rl.worlds.mutations import Mutant, mutants_of, normal_form

NUM_TESTS = 16
NUM_GROUPS = 3
FIXED_TIME = 1_700_000_000  # seconds since 1970: the time of all files
FOLDERS = ("toolkit", "library", "core", "helpers", "engine", "tools")
MODULES = ("numbers", "series", "tables", "basics", "parts", "pieces")


@dataclass(frozen=True)
class HiddenTest:
    """A call of the function, and the value that the correct function returns."""

    arguments: tuple[Any, ...]
    expected: Any


@dataclass(frozen=True)
class Repository:
    """A repository with one bug.

    Attributes:
        issue: The bug report.
        files: The repository, by path.
        module: The dotted module of the function.
        function: Its name.
        path: The file with the bug.
        broken: Source of the function with the bug.
        whole: Source of the correct function.
        kind: Kind of the bug, one of `mutations.KINDS`.
        tests: The hidden tests.
        groups: The tests grouped by the number of bugs that each detects, easiest first (MiMo-7B, section 3.3.1).
    """

    issue: str
    files: Mapping[str, str]
    module: str
    function: str
    path: str
    broken: str
    whole: str
    kind: str
    tests: tuple[HiddenTest, ...]
    groups: Groups


@dataclass(frozen=True)
class _Function:
    """A correct function, its tests, and the mutants that at least one test detects. passed: bool [mutants, tests]."""

    template: Template
    source: str
    tests: tuple[HiddenTest, ...]
    mutants: tuple[Mutant, ...]
    passed: np.ndarray


def make_repository(rng: random.Random, num_functions: int) -> Repository:
    """A repository with `num_functions` functions in one module. The issue depends on the bug only."""
    templates = rng.sample(TEMPLATES, min(num_functions, len(TEMPLATES)))
    sources = [_function(template.name, rng.randint(template.least, template.most)) for template in templates]
    chosen = sources[0]
    number = rng.randrange(len(chosen.mutants))
    mutant = chosen.mutants[number]
    rng.shuffle(sources)
    bodies = [mutant.source if function is chosen else function.source for function in sources]
    folder, module = rng.choice(FOLDERS), rng.choice(MODULES)
    path = f"{folder}/{module}.py"
    names = "\n".join(f"- `{function.template.name}`" for function in sources)
    files = {
        "README.md": f"# {folder}\n\nFunctions in `{path}`:\n\n{names}\n",
        f"{folder}/__init__.py": "",
        path: f'"""Some {module}."""\n\n\n' + "\n\n".join(bodies),
    }
    issue = _issue(chosen.template.name, chosen.tests, mutant, chosen.passed[number])
    groups = difficulty_groups(chosen.passed, NUM_GROUPS)
    return Repository(issue, files, f"{folder}.{module}", chosen.template.name, path, mutant.source, chosen.source,
                      mutant.kind, chosen.tests, groups)  # fmt: skip


@functools.lru_cache(maxsize=256)
def _function(name: str, k: int) -> _Function:
    template = next(template for template in TEMPLATES if template.name == name)
    source = normal_form(template.source.replace("$K", str(k)))
    rng = random.Random(f"{name} {k}")
    whole = _loaded(source, name)
    inputs = [template.arguments(rng, k) for _ in range(NUM_TESTS)]
    tests = tuple(HiddenTest(arguments, whole(*arguments)) for arguments in inputs)
    found = [(mutant, _passed(mutant.source, name, tests)) for mutant in mutants_of(source)]
    kept = [(mutant, passed) for mutant, passed in found if not all(passed)]
    return _Function(
        template, source, tests, tuple(mutant for mutant, _ in kept), np.array([passed for _, passed in kept])
    )


def _loaded(source: str, name: str) -> Callable[..., Any]:
    """Loads a function from a source of this package (original or mutant), never from model-written text."""
    scope: dict[str, Any] = {}
    exec(compile(source, name, "exec", dont_inherit=True), scope)
    return scope[name]


def _passed(source: str, name: str, tests: Sequence[HiddenTest]) -> list[bool]:
    return [_outcome(_loaded(source, name), test.arguments) == repr(test.expected) for test in tests]


def _outcome(function: Callable[..., Any], arguments: Sequence[Any]) -> str:
    try:
        return repr(function(*arguments))
    except Exception as error:  # a bug may raise anything
        return f"{type(error).__name__}"


def _issue(name: str, tests: Sequence[HiddenTest], mutant: Mutant, passed: Sequence[bool]) -> str:
    """The issue text: the first failing call, and the request to fix it."""
    test = next(test for test, is_right in zip(tests, passed, strict=True) if not is_right)
    call = f"{name}({', '.join(map(repr, test.arguments))})"
    returned = _outcome(_loaded(mutant.source, name), test.arguments)
    return (
        f"`{name}` does not do what its docstring says: `{call}` should return `{test.expected!r}`, but it returns "
        f"`{returned}`. Find the bug, fix it for all arguments, and call `finish`."
    )
