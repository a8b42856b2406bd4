"""Restricts `eval` to expressions while a library reads model-written text.

Scorers of several libraries pass an answer to `eval`, some through sympy's `parse_expr`. Even in the child process such
text could run code and write its own score. Here `eval` and `compile` accept arithmetic, containers, comparisons, and
calls of sympy's classes and of a few functions. They refuse attributes, lambdas, comprehensions and other calls.
"""

import ast
import builtins
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

FUNCTIONS = frozenset({
    "abs", "bool", "complex", "dict", "float", "frozenset", "int", "len", "list", "max", "min", "pow", "range", "round",
    "set", "sorted", "str", "sum", "tuple", "Abs", "Max", "Min", "ceiling", "cbrt", "cos", "cot", "csc", "exp",
    "factorial", "floor", "ln", "log", "real_root", "root", "sec", "sin", "sqrt", "tan",
})  # fmt: skip
ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Constant, ast.Name, ast.Call,
    ast.keyword, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
    ast.expr_context,
)  # fmt: skip


class RefusedExpressionError(ValueError):
    """The text is not an allowed expression."""


def check_expression(source: str | bytes | ast.AST) -> None:
    """Raise RefusedExpressionError or SyntaxError unless `source` is an allowed expression."""
    tree = source if isinstance(source, ast.AST) else ast.parse(source, mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED):
            raise RefusedExpressionError(f"{type(node).__name__} is not allowed in an answer")
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            raise RefusedExpressionError(f"the name {node.id!r} is not allowed in an answer")
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and _may_be_called(node.func.id)):
            raise RefusedExpressionError("this call is not allowed in an answer")


@contextlib.contextmanager
def only_expressions() -> Iterator[None]:
    """Apply `check_expression` in `eval` and `compile` during the block, except for callers in the standard library."""
    plain_eval, plain_compile = builtins.eval, builtins.compile

    def guarded_eval(source: Any, globals: Any = None, locals: Any = None, /) -> Any:
        caller = sys._getframe(1)
        if isinstance(source, (str, bytes)) and not _is_standard(caller):
            check_expression(source)
        if globals is None:
            globals, locals = caller.f_globals, caller.f_locals
        return plain_eval(source, globals, locals)

    def guarded_compile(source: Any, filename: Any, mode: str, *rest: Any, **options: Any) -> Any:
        if mode == "eval" and not _is_standard(sys._getframe(1)):
            check_expression(source)
        return plain_compile(source, filename, mode, *rest, **options)

    builtins.eval, builtins.compile = guarded_eval, guarded_compile
    try:
        yield
    finally:
        builtins.eval, builtins.compile = plain_eval, plain_compile


def _may_be_called(name: str) -> bool:
    sympy: Any = sys.modules.get("sympy")
    found = getattr(sympy, name, None)
    return name in FUNCTIONS or isinstance(found, type) and issubclass(found, sympy.Basic)


def _is_standard(frame: Any) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in sys.stdlib_module_names
