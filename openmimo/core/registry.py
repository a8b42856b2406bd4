"""Plug-ins by file name: a name is a file in a folder that exports one `PLUGIN`, or an external object.

There is no table and no import-time registration: adding a file to the folder adds the name. Contract tests are
parametrized over `names()`, so they cover new files automatically. An external object is `path/file.py:Object` or
`package.module:Object`; its code runs only because the user named it.
"""

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from openmimo.core.errors import ConfigError

Plugin = TypeVar("Plugin")


class Registry(Generic[Plugin]):
    """The plug-ins of one folder. Folders, and files whose name starts with `_`, are not plug-ins.

    Args:
        package: The dotted name of the folder, such as `openmimo.evals.tasks`.
        plugin_type: The class of each `PLUGIN`.
    """

    def __init__(self, package: str, plugin_type: type[Plugin]):
        self.package = package
        self.plugin_type = plugin_type

    def names(self) -> list[str]:
        """Return the sorted names in the folder. Imports only the `__init__` of the folder."""
        paths = importlib.import_module(self.package).__path__
        modules = (module for module in pkgutil.iter_modules(paths) if not module.ispkg)
        return sorted(module.name for module in modules if not module.name.startswith("_"))

    def get(self, name: str) -> Plugin:
        """Return the plug-in `name`, or the external object `path/file.py:Object` or `package.module:Object`.

        Raises:
            ConfigError: The name does not exist, or its module fails on import.
        """
        if ":" not in name and name not in self.names():
            raise ConfigError(
                f"{self.package} has no {self.plugin_type.__name__} called {name!r}; it has {', '.join(self.names())}. "
                f"{_FORMS}"
            )
        plugin = load_object(name if ":" in name else f"{self.package}.{name}:PLUGIN")
        if not isinstance(plugin, self.plugin_type):
            raise ConfigError(f"{name!r} is a {type(plugin).__name__}, not a {self.plugin_type.__name__}.")
        return plugin


_FORMS = "Refer to your own code as 'path/file.py:Object' or 'package.module:Object'."


def load_object(name: str) -> Any:
    """The object `path/file.py:Object` or `package.module:Object`.

    A file is imported once in a process. It finds the modules of its own folder after all others.

    Raises:
        ConfigError: There is no such file, module or object, or its code fails on import.
    """
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{name!r} names no object. {_FORMS}")
    try:
        module = _load_file(Path(module_name), name) if module_name.endswith(".py") else _import(module_name, name)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # external code may raise any error
        raise ConfigError(
            f"{name!r} cannot be imported: {_location_of(error)}: {type(error).__name__}: {error}."
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        known = ", ".join(key for key in vars(module) if not key.startswith("_"))
        raise ConfigError(f"{module_name} has no {attribute!r}; it has {known or 'nothing'}.") from error


def _load_file(file: Path, name: str) -> ModuleType:
    path = file.expanduser().absolute()
    if not path.is_file():
        raise ConfigError(f"{name!r}: there is no file {path}. Give its path from the working folder.")
    module_name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _import(module_name: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"{name!r} does not begin with a module name. {_FORMS}")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if module_name == error.name or module_name.startswith(f"{error.name}."):
            raise ConfigError(
                f"{name!r}: Python finds no module {error.name!r}. Give its file, as in 'path/file.py:Object', or add "
                "its folder to PYTHONPATH."
            ) from error
        raise


def _location_of(error: BaseException) -> str:
    """Return file and line of an exception or a syntax error."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"
