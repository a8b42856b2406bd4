"""Objects from JSON Lines, with errors that name file and line.

A malformed line raises an error, so that a run never skips data silently.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from openmimo.core.errors import DataError
from openmimo.data.compressed import read_lines, with_packed

SUFFIXES = (*with_packed(".jsonl"), ".json.gz", ".json.zst")
_MAY_HOLD_SURROGATES = re.compile(r"\\u[dD][89a-fA-F]")


def read_file(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, object) for each line of a file. Skips empty lines.

    Raises:
        DataError: A line is not a JSON object of valid text and finite numbers.
    """
    number = 0
    for line in read_lines(file):
        number += 1
        if line.isspace():
            continue
        where = f"{file}, line {number}"
        text = _text(line, where)
        del line  # a line may be large, and is not needed while the caller uses the object
        if number == 1 and text.lstrip().startswith("["):
            raise DataError(
                f"{where}: expected a JSON object in each line, found a list. Convert it: jq -c '.[]' {file} > "
                f"{file.stem}_lines.jsonl"
            )
        value = _parsed(text, where)
        if _MAY_HOLD_SURROGATES.search(text):
            _refuse_surrogates(value, where)
        del text
        yield where, value
        del value


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte {error.start} of the line). Convert the file, or delete the line."
        ) from error


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}). Correct or delete the line.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found a {type(value).__name__}.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_surrogates(value: Any, where: str, key: str = "") -> None:
    """Raise DataError for a lone surrogate, which has no UTF-8 encoding."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_surrogates(name, where, "a key")
            _refuse_surrogates(item, where, key or repr(name))
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item, where, key)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])
            raise DataError(
                f"{where}: the text under {key} contains half a character ({half}, a lone surrogate). Correct or "
                "delete the line."
            ) from error
