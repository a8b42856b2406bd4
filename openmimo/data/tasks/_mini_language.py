"""A small language of programs on digits, such as `rev;inc3;take4`: every program ends, and none can do harm.

A program is a list of operations, divided by `;`, that change a string of digits one after another. A budget of steps
bounds what it may cost.
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
    """The operations of a program. Raises ProgramError."""
    return tuple(_parse_operation(part) for part in text.strip().split(";"))


def to_text(program: Program) -> str:
    """The program as `parse` reads it."""
    return ";".join(name if number is None else f"{name}{number}" for name, number in program)


def run(program: Program, digits: str, max_steps: int = MAX_STEPS) -> str:
    """What the program makes of `digits`. An operation costs a step and one for each digit. Raises ProgramError."""
    steps = 0
    for name, number in program:
        steps += 1 + len(digits)
        if steps > max_steps:
            raise ProgramError(f"The program takes more than {max_steps} steps.")
        digits = _PLAIN[name](digits) if number is None else _WITH_NUMBER[name](digits, number)
    return digits


def passes(program: Program, digits: str, expected: str) -> bool:
    """Whether the program makes `expected` of `digits` within its budget."""
    try:
        return run(program, digits) == expected
    except ProgramError:
        return False


def random_operation(rng: random.Random) -> Operation:
    """One operation; numbers are from 1 to 9 for `inc`, 2 to 9 for `mul`, 1 to 4 for the others."""
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
    raise ProgramError(f"{text[:20]!r} is no operation.")
