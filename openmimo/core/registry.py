"""Plug-ins by file name: a name is a file in a folder that exports one `PLUGIN`, or `package.module:Object`.

There is no table to edit and no import-time registration: dropping a file into the folder adds the name, and the
contract tests, which are parametrized over `names()`, hold it to the rules.
"""

import importlib
import pkgutil
import traceback
from types import ModuleType
from typing import Generic, TypeVar

from openmimo.core.errors import ConfigError

Plugin = TypeVar("Plugin")


class Registry(Generic[Plugin]):
    """The plug-ins of one folder.

    `package` is the dotted folder, such as `openmimo.evals.tasks`; `plugin_type` is what each `PLUGIN` must be an
    instance of. Files whose name starts with `_` are not plug-ins.
    """

    def __init__(self, package: str, plugin_type: type[Plugin]):
        self.package = package
        self.plugin_type = plugin_type

    def names(self) -> list[str]:
        """The names in the folder, sorted. Imports the folder's `__init__` only."""
        paths = importlib.import_module(self.package).__path__
        return sorted(module.name for module in pkgutil.iter_modules(paths) if not module.name.startswith("_"))

    def get(self, name: str) -> Plugin:
        """The plug-in called `name`, or the outside object `package.module:Object`.

        Raises ConfigError if there is no such name, or if the file that it names fails while it is imported; the
        message then says where.
        """
        if ":" in name:
            module_name, attribute = name.split(":", 1)
        elif name in self.names():
            module_name, attribute = f"{self.package}.{name}", "PLUGIN"
        else:
            raise ConfigError(
                f"{self.package} has no {self.plugin_type.__name__} called {name!r}; it has {', '.join(self.names())}. "
                "Code of your own is named 'package.module:Object'."
            )
        module = _import(module_name, name)
        try:
            plugin = getattr(module, attribute)
        except AttributeError as error:
            raise ConfigError(f"{name!r} names no {self.plugin_type.__name__}: {error}.") from error
        if not isinstance(plugin, self.plugin_type):
            raise ConfigError(f"{name!r} is a {type(plugin).__name__}, not a {self.plugin_type.__name__}.")
        return plugin


def _import(module_name: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"{name!r} does not name a module; code of your own is named 'package.module:Object'.")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if module_name == error.name or module_name.startswith(f"{error.name}."):
            raise ConfigError(
                f"{name!r}: there is no module {error.name!r} where Python looks. Name its folder in PYTHONPATH."
            ) from error
        raise ConfigError(f"{name!r} cannot be imported: {_place(error)}: {error}.") from error
    except Exception as error:  # any error of the plug-in's own code
        raise ConfigError(f"{name!r} cannot be imported: {_place(error)}: {type(error).__name__}: {error}.") from error


def _place(error: BaseException) -> str:
    """File and line that raised an error, or that cannot be parsed."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"
