"""Parses the arguments of a command with tyro. Errors become a UsageError of one paragraph."""

import contextlib
import dataclasses
import io
import os
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import tyro

from openmimo.core.config import from_dict
from openmimo.core.errors import ConfigError, UserError
from openmimo.core.fields import field_types, new_key, warn_of_renamed

_MAX_CHARACTERS = 2000
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class UsageError(UserError):
    """The command line cannot be parsed. The exit code is 2."""


def parse(
    target: Callable[..., Any], arguments: list[str], prog: str, default: Any = None, *, listed: Any = None
) -> Any:
    """Parses the arguments of a command. `--help-all` prints every option with its type, default and text.

    Args:
        target: A dataclass, or a function whose parameters are the options.
        arguments: The words after the verb.
        prog: The command and verb, for messages.
        default: An object of `target` that the arguments change (None: the defaults of its fields).
        listed: A dataclass object of further options, which `--help-all` lists; `split_options` has parsed them.

    Returns:
        An object of the dataclass `target`, or the return value of the function `target`.

    Raises:
        UsageError: An option is unknown, has no value or one of another type, or a word is not UTF-8.
        ConfigError: A value is out of range.
    """
    _check_encoding(arguments, prog)
    if isinstance(target, type):
        arguments = with_new_options(target, arguments, prog)
    if "--help-all" in arguments:
        arguments, target, default = ["--help"], *_with_listed(target, default, listed)
    keywords = {} if default is None else {"default": default}
    with usage_paragraph(prog):
        return tyro.cli(target, args=arguments, prog=prog, **keywords)


def _with_listed(target: Any, default: Any, listed: Any) -> tuple[Any, Any]:
    """The target and default with the options of `listed` before them, for the help."""
    if listed is None:
        return target, default
    flat = tyro.conf.arg(name="")
    parts: list[tuple[str, Any]] = [
        ("own", typing.Annotated[type(listed), flat]), ("config", typing.Annotated[target, flat]),
    ]  # fmt: skip
    both = dataclasses.make_dataclass(target.__name__, parts, frozen=True)
    both.__doc__ = target.__doc__
    return both, both(listed, default)


def split_options(options_type: type, arguments: list[str], prog: str) -> tuple[Any, list[str]]:
    """Splits off the options of a dataclass whose fields are texts, and returns them with the other arguments.

    Raises:
        UsageError: An option has no value.
        ConfigError: A value is not one of those that the field allows.
    """
    names = {f"--{name.replace('_', '-')}": name for name in field_types(options_type)}
    values: dict[str, str] = {}
    others: list[str] = []
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        name = names.get(option.replace("_", "-"))
        if name is None:
            others.append(f"{option}{equals}{value}")
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"{prog}: {option} needs a value.")
            value = rest.pop(0)
        if not value:
            raise UsageError(f"{prog}: {option} has an empty value.")
        values[name] = value
    try:
        return from_dict(options_type, values, where=prog), others
    except ConfigError as error:
        raise UsageError(str(error)) from error


def asks_for_help(arguments: list[str]) -> bool:
    """Whether the arguments ask for the short help."""
    return any(word in ("-h", "--help") for word in arguments) and "--help-all" not in arguments


def with_new_options(config_type: type, arguments: list[str], prog: str) -> list[str]:
    """Replaces earlier names of options by their new names, with one warning if there are any."""
    renamed: dict[str, str] = {}
    result = []
    for word in arguments:
        option, equals, value = word.partition("=")
        new = _new_option(config_type, option) if option.startswith("--") else option
        if new != option:
            renamed[option] = new
        result.append(f"{new}{equals}{value}")
    if renamed:
        warn_of_renamed(prog, tuple(renamed.items()))
    return result


def _new_option(config_type: Any, option: str) -> str:
    """Replaces the renamed keys of an option: --stages.0.peak-lr becomes --stages.0.learning-rate."""
    path = []
    for key in option.removeprefix("--").split("."):
        if not key.isdigit():
            while not dataclasses.is_dataclass(config_type) and typing.get_args(config_type):
                config_type = typing.get_args(config_type)[0]
            if not (isinstance(config_type, type) and dataclasses.is_dataclass(config_type)):
                return option
            name = key.replace("-", "_")
            new = new_key(config_type, name)
            key = key if new is None else new.replace("_", "-")
            config_type = field_types(config_type).get(name if new is None else new)
        path.append(key)
    return "--" + ".".join(path)


@contextlib.contextmanager
def usage_paragraph(prog: str) -> Iterator[None]:
    """Converts an exit of a parser with code 2 to a UsageError with the text that it printed on standard error."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stopped:
        if stopped.code != 2:
            raise
        raise UsageError(f"{_sentence(printed.getvalue())} Run `{prog} --help` to see every option.") from None


def paragraph(text: str) -> str:
    """Returns `text` on one line, without control characters, shortened to about 2,000 characters."""
    line = " ".join(text.split())
    if len(line) > _MAX_CHARACTERS:
        line = f"{line[: _MAX_CHARACTERS // 2]} ... {line[-_MAX_CHARACTERS // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def _check_encoding(arguments: list[str], prog: str) -> None:
    for place, word in enumerate(arguments, start=1):
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            shown = ascii(os.fsencode(word))[1:] if _is_bytes(word) else ascii(word)
            raise UsageError(f"{prog}: word {place}, {shown[:200]}, is not UTF-8 text; write it in UTF-8.") from None


def _is_bytes(word: str) -> bool:
    """Whether all surrogates in `word` represent undecodable bytes, as in `sys.argv`."""
    return all(not "\ud800" <= c <= "\udfff" or "\udc80" <= c <= "\udcff" for c in word)


def _sentence(printed: str) -> str:
    """Extracts the error message from the output of tyro (a box) or argparse (its last line).

    A box contains a title, a rule, the text, another rule, and advice. On UTF-8 terminals the frame contains the title
    and there is no first rule.
    """
    lines = [line.strip("│ ") for line in _ESCAPE.sub("", printed).splitlines()]
    if printed.startswith("usage:"):
        return lines[-1].rstrip(".") + "."
    inside = [line for line in lines if line and not line.startswith("╰")]
    start = 1 if inside and inside[0].startswith("╭") else 2
    text: list[str] = []
    for line in inside[start:]:
        if set(line) <= {"─", "-"}:
            break
        text.append(line)
    return " ".join(" ".join(text).split()).rstrip(".") + "."
