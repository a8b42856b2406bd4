"""Evaluates arithmetic that a model wrote: whole numbers, `+ - * /`, parentheses; exact, and no code is run."""

from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DEPTH = 40


class ExpressionError(ValueError):
    """The text is not an expression, or has no value."""


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The value of the expression and the numbers in it, from left to right. Raises ExpressionError."""
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"The expression is longer than {MAX_CHARACTERS} characters.")
    reader = _Reader("".join(text.split()))
    value = reader.sum(depth=0)
    if reader.position != len(reader.text):
        raise ExpressionError(f"{reader.text[reader.position]!r} is out of place.")
    return value, reader.numbers


class _Reader:
    """Recursive descent; each method reads what it is named after from `position` on and gives its value."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.numbers: list[int] = []

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while (sign := self._take("+-")) is not None:
            term = self.product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while (sign := self._take("*/")) is not None:
            factor = self.factor(depth)
            if sign == "/" and factor == 0:
                raise ExpressionError("The expression divides by zero.")
            value = value * factor if sign == "*" else value / factor
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"The expression is nested more than {MAX_DEPTH} deep.")
        if self._take("-"):
            return -self.factor(depth + 1)
        if self._take("("):
            value = self.sum(depth + 1)
            if not self._take(")"):
                raise ExpressionError("A parenthesis is not closed.")
            return value
        digits = ""
        while (digit := self._take("0123456789")) is not None:
            digits += digit
        if not digits:
            raise ExpressionError("A number is missing.")
        self.numbers.append(int(digits))
        return Fraction(int(digits))

    def _take(self, characters: str) -> str | None:
        """The next character if it is one of `characters`."""
        character = self.text[self.position : self.position + 1]
        if not character or character not in characters:
            return None
        self.position += 1
        return character
