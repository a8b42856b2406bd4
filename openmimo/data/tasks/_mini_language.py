"""A small language of programs on digits, such as `rev;inc3;take4`. Every program terminates and is harmless.

A program is a list of operations, separated by `;`, which transform a string of digits in turn. A budget of steps
limits its cost.
"""

import random
import re
from collections.abc import Callable

MAX_STEPS = 500

Operation = tuple[str, int | None]
Program = tuple[Operation, ...]

_OPERATION = re.compile(r"([a-z]{1,8})([0-9])?")

_PLAIN: dict[str, Callable[[str], str]] = {
    "rev": lambda digits: digits[::-1],
    "sort": lambda digits: "".join(sorted(digits)),
    "uniq": lambda digits: "".join(dict.fromkeys(digits)),
    "dup": lambda digits: digits + digits,
    "odd": lambda digits: "".join(digit for digit in digits if digit in "13579"),
    "even": lambda digits: "".join(digit for digit in digits if digit in "02468"),
}
_WITH_NUMBER: dict[str, Callable[[str, int], str]] = {
    "inc": lambda digits, number: "".join(str((int(digit) + number) % 10) for digit in digits),
    "mul": lambda digits, number: "".join(str(int(digit) * number % 10) for digit in digits),
    "take": lambda digits, number: digits[:number],
    "drop": lambda digits, number: digits[number:],
    "rot": lambda digits, number: digits[number % len(digits) :] + digits[: number % len(digits)] if digits else "",
}


class ProgramError(ValueError):
    """The text is not a program, or the program takes too many steps."""


def parse(text: str) -> Program:
    """Parse a program. Raises ProgramError."""
    return tuple(_parse_operation(part) for part in text.strip().split(";"))


def to_text(program: Program) -> str:
    """Return the text of a program, the inverse of `parse`."""
    return ";".join(name if number is None else f"{name}{number}" for name, number in program)


def run(program: Program, digits: str, max_steps: int = MAX_STEPS) -> str:
    """Run a program on `digits` and return its output.

    An operation costs one step plus one step per digit of its input. Raises ProgramError beyond `max_steps`.
    """
    steps = 0
    for name, number in program:
        steps += 1 + len(digits)
        if steps > max_steps:
            raise ProgramError(f"The program takes more than {max_steps} steps.")
        digits = _PLAIN[name](digits) if number is None else _WITH_NUMBER[name](digits, number)
    return digits


def passes(program: Program, digits: str, expected: str) -> bool:
    """Return whether the program's output for `digits` is `expected`, within its budget."""
    try:
        return run(program, digits) == expected
    except ProgramError:
        return False


def random_operation(rng: random.Random) -> Operation:
    """Draw an operation. Its number is 1 to 9 for `inc`, 2 to 9 for `mul`, and 1 to 4 for the others."""
    name = rng.choice([*_PLAIN, *_WITH_NUMBER])
    if name in _PLAIN:
        return name, None
    return name, rng.randint(2 if name == "mul" else 1, 9 if name in ("inc", "mul") else 4)


def _parse_operation(text: str) -> Operation:
    match = _OPERATION.fullmatch(text.strip())
    name, number = match.groups() if match else ("", None)
    if name in _PLAIN and number is None:
        return name, None
    if name in _WITH_NUMBER and number is not None:
        return name, int(number)
    raise ProgramError(f"{text[:20]!r} is not an operation.")
