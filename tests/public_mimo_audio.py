"""The public code of MiMo-Audio as a test oracle. It is never part of this package.

The environment variable OPENMIMO_MIMO_AUDIO_SOURCE names a clone of github.com/XiaomiMiMo/MiMo-Audio, bare or not, or
the folder `src` of one.
"""

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

VARIABLE = "OPENMIMO_MIMO_AUDIO_SOURCE"


def public_text(path: str) -> str:
    """Returns a file of the public repository; skips the test without the variable, and fails if it is unusable."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} does not name a clone of github.com/XiaomiMiMo/MiMo-Audio")
    folder = Path(os.environ[VARIABLE])
    for parent in (folder, folder.parent):
        if (parent / path).is_file():
            return (parent / path).read_text()
    command = ["git", "--git-dir", str(folder), "show", f"HEAD:{path}"]
    shown = subprocess.run(command, check=False, capture_output=True, text=True)
    if shown.returncode:
        pytest.fail(f"{VARIABLE} is {folder}, which has no {path}: {shown.stderr.strip()}")
    return shown.stdout


def public_package(name: str, modules: Sequence[str], folder: Path) -> types.ModuleType:
    """Returns a package of the public folder `src`, imported from a copy of its modules in `folder`."""
    texts = {module: public_text(f"src/{name}/{module}.py") for module in modules}
    if name not in sys.modules:
        (folder / name).mkdir(parents=True)
        for module, text in texts.items():
            (folder / name / f"{module}.py").write_text(text)
        sys.path.append(str(folder))
    return importlib.import_module(name)


def public_module(path: str, name: str, *, replace: tuple[str, str] = ("", "")) -> types.ModuleType:
    """Returns a file of the public repository as a module; `replace` changes its text."""
    text = public_text(path)
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    exec(compile(text.replace(*replace) if replace[0] else text, path, "exec"), vars(module))
    return module
