"""The short help of a command: its main options with type, default and line, and the names of all others.

`--help` prints it; `--help-all` prints the help of tyro, which explains every option.
"""

import collections.abc
import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from openmimo.core.fields import field_types

_MAX_COLUMNS = 100
_MAX_GROUPS = 12  # with more, only their prefixes are named
_INDENT = " " * 6
_FLAT = tyro.conf.arg(name="")  # marks a nested config whose options have no prefix
_POSITIONAL = typing.get_args(tyro.conf.Positional[str])[1]
_ENTRY = re.compile(r"^    (\w+): (.+)$")


def short_help(config: Any, *, usage: str, main: Sequence[str], note: str = "", own: Any = None) -> str:
    """The text of the short help.

    Args:
        config: The config whose values are the defaults, or its type.
        usage: The first line, without "usage:".
        main: The options that are explained, in their order. Names that the config has not outside its groups have no
            effect.
        note: A paragraph after the first one of the docstring.
        own: Options for the user's own data, which come first.
    """
    columns = min(_MAX_COLUMNS, shutil.get_terminal_size().columns)
    rows = list(_rows(config))
    by_name = {row.name: row for row in rows if not row.group}
    shown = [by_name[name] for name in main if name in by_name]
    lines = [f"usage: {usage}", "", *textwrap.wrap(_summary(config), columns)]
    lines += ["", *textwrap.wrap(note, columns)] if note else []
    if own is not None:
        lines += ["", f"{_summary(own).rstrip('.').lower()}:", *_entries(list(_rows(own)), columns)]
    lines += ["", "options:", *_entries(shown, columns)]
    others = [row for row in rows if row not in shown]
    if others:
        lines += ["", "more options, explained by --help-all:", *_groups(others, columns)]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One option: its group ("" outside groups), name, how it is written, text and default."""

    group: str
    name: str
    written: str
    text: str
    default: str


def _rows(config: Any, group: str = "") -> Iterator[_Row]:
    """The options of a config, and one row for each option of its groups."""
    config_type = config if isinstance(config, type) else type(config)
    texts, types = _texts(config_type), field_types(config_type)
    for field in dataclasses.fields(config_type):
        value = _value(config, field)
        items = value if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]) else [value]
        for number, item in enumerate(items):
            part = f"{field.name}.{number}" if isinstance(value, tuple) else field.name
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                yield from _rows(item, group if _FLAT in typing.get_args(types[field.name]) else f"{group}{part}.")
            elif number == 0:
                written, text = _written(field.name, types[field.name]), texts.get(field.name, "")
                default = "" if "(default:" in text else _default(value)
                yield _Row(group, field.name, written, text, default)


def _value(config: Any, field: dataclasses.Field) -> Any:
    if not isinstance(config, type):
        return getattr(config, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _default(value: Any) -> str:
    """The end of an option's text; nothing for a value that means "not given"."""
    if value is dataclasses.MISSING:
        return " (required)"
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "" if shown in ("None", "{}", "") else f" (default: {shown})"


def _written(name: str, annotation: Any) -> str:
    """How an option is written, such as `--seed INT` or `PATH`."""
    flag, kind = f"--{name.replace('_', '-')}", _kind(annotation)
    if _POSITIONAL in typing.get_args(annotation):
        return name.upper()
    return f"{flag}.NAME VALUE" if kind == "MAPPING" else f"{flag} {kind}".rstrip()


def _kind(annotation: Any) -> str:
    """The type of an option's value, such as INT or {a,b}; nothing for a switch."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(parts[0])
    if origin is typing.Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin in (dict, collections.abc.Mapping):
        return "MAPPING"
    real = [part for part in parts if part not in (type(None), Ellipsis)]
    if origin is not None and real:
        return _kind(real[0]) + (" ..." if origin is tuple else "")
    return "" if annotation is bool else annotation.__name__.upper()


def _entries(rows: list[_Row], columns: int) -> Iterator[str]:
    for row in rows:
        yield f"  {row.written}"
        yield from textwrap.wrap(f"{row.text}{row.default}", columns, initial_indent=_INDENT, subsequent_indent=_INDENT)


def _groups(rows: list[_Row], columns: int) -> Iterator[str]:
    """One paragraph for each group of options, with their names; equal numbered groups share one."""
    found: dict[tuple[str, ...], list[str]] = {}
    by_group: dict[str, list[str]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row.name.replace("_", "-"))
    for group, names in by_group.items():
        found.setdefault((re.sub(r"\d+", "N", group), *names), []).append(group)
    if len(found) > _MAX_GROUPS:
        prefixes = dict.fromkeys(group.partition(".")[0] for group in by_group)
        names = [f"{prefix.replace('_', '-')}.NAME" for prefix in prefixes if prefix]
        found = {("", *names, *by_group.get("", ())): [""]}
    for (pattern, *options), groups in found.items():
        prefix = groups[0] if len(groups) == 1 else pattern
        named = f"--{prefix.replace('_', '-')}NAME: {', '.join(options)}"
        text = named if prefix else ", ".join(f"--{name}" for name in options)
        yield from textwrap.wrap(text, columns, initial_indent="  ", subsequent_indent=_INDENT, break_on_hyphens=False)


def _summary(config: Any) -> str:
    """The first paragraph of the docstring of a config."""
    return " ".join((inspect.getdoc(config) or "").split("\n\n")[0].split())


def _texts(config_type: type) -> dict[str, str]:
    """The text of each field: its entry under "Attributes:" in the docstring of its class, or of a base class."""
    found: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        name = ""
        for line in inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].splitlines():
            if entry := _ENTRY.match(line):
                name = entry[1]
                found[name] = entry[2]
            elif name and line.startswith("        "):
                found[name] += " " + line.strip()
            else:
                name = ""
    return found
