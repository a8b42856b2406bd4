"""Plug-ins by file name: a name is a file in a folder that exports one `PLUGIN`, or `package.module:Object`.

There is no table and no import-time registration: adding a file to the folder adds the name. Contract tests are
parametrized over `names()`, so they cover new files automatically.
"""

import importlib
import pkgutil
import traceback
from types import ModuleType
from typing import Generic, TypeVar

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
        """Return the plug-in `name`, or the external object `package.module:Object`.

        Raises:
            ConfigError: The name does not exist, or its module fails on import.
        """
        if ":" in name:
            module_name, attribute = name.split(":", 1)
        elif name in self.names():
            module_name, attribute = f"{self.package}.{name}", "PLUGIN"
        else:
            raise ConfigError(
                f"{self.package} has no {self.plugin_type.__name__} called {name!r}; it has {', '.join(self.names())}. "
                "Refer to code outside the package as 'package.module:Object'."
            )
        module = _import(module_name, name)
        try:
            plugin = getattr(module, attribute)
        except AttributeError as error:
            raise ConfigError(f"{name!r} is not a {self.plugin_type.__name__}: {error}.") from error
        if not isinstance(plugin, self.plugin_type):
            raise ConfigError(f"{name!r} is a {type(plugin).__name__}, not a {self.plugin_type.__name__}.")
        return plugin


def _import(module_name: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(
            f"{name!r} is not a module name; refer to code outside the package as 'package.module:Object'."
        )
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if module_name == error.name or module_name.startswith(f"{error.name}."):
            raise ConfigError(
                f"{name!r}: Python finds no module {error.name!r}. Add its folder to PYTHONPATH."
            ) from error
        raise ConfigError(f"{name!r} cannot be imported: {_location_of(error)}: {error}.") from error
    except Exception as error:  # the code of a plug-in may raise any error
        raise ConfigError(
            f"{name!r} cannot be imported: {_location_of(error)}: {type(error).__name__}: {error}."
        ) from error


def _location_of(error: BaseException) -> str:
    """Return file and line of an exception or a syntax error."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"
