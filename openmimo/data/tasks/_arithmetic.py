"""Arithmetic in text: whole numbers, `+ - * /` and parentheses. Python parses it; nothing is executed.

Values are exact fractions. Length and depth are bounded, so the text of a model costs little.
"""

import ast
import operator
import re
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DEPTH = 40
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_NUMBER_MISSING = re.compile(r"(?:^|[+\-*/(])(?![0-9(-])")


class ExpressionError(ValueError):
    """The text is not a supported expression, or it divides by zero."""


class _UnsupportedError(Exception):
    """The expression contains an unsupported Python operation."""


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Return the value of an expression and its numbers from left to right. White space is ignored.

    Raises:
        ExpressionError: The text is malformed, too long or nested too deeply, or it divides by zero.
    """
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"The expression is longer than {MAX_CHARACTERS} characters.")
    text = "".join(text.split())
    if not re.fullmatch(r"[0-9+\-*/()]+", text):
        raise _malformed(text)
    _check_depth(text)
    try:
        tree = ast.parse(re.sub(r"\b0+(?=[0-9])", "", text), mode="eval")  # Python rejects leading zeros
    except SyntaxError as error:
        raise _malformed(text) from error
    numbers: list[int] = []
    try:
        return _value(tree.body, numbers), numbers
    except ZeroDivisionError as error:
        raise ExpressionError("The expression divides by zero.") from error
    except _UnsupportedError as error:
        raise _malformed(text) from error


def _malformed(text: str) -> ExpressionError:
    if _NUMBER_MISSING.search(text):
        return ExpressionError("A number is missing.")
    return ExpressionError("The text is not an expression of whole numbers, + - * / and parentheses.")


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int() as number):
            numbers.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
            return _OPERATIONS[type(operation)](_value(left, numbers), _value(right, numbers))
    raise _UnsupportedError


def _check_depth(text: str) -> None:
    """Reject more than MAX_DEPTH nested parentheses and signs, before Python's parser recurses over them."""
    outside: list[int] = []  # for each open parenthesis, the depth outside of it
    depth, inside, previous = 0, 0, "("
    for character in text:
        if character == "(":
            outside.append(inside)
            depth = inside = depth + 1
        elif character == ")":
            depth = inside = outside.pop() if outside else 0
        elif character == "-" and previous in "(+-*/":
            depth += 1
        else:
            depth = inside
        if depth > MAX_DEPTH:
            raise ExpressionError(f"The expression is nested more than {MAX_DEPTH} deep.")
        previous = character
