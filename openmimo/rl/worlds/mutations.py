"""Mutations of a function in one place: the bugs that code agents must fix (section 4.3.2)."""

import ast
from typing import NamedTuple

_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv}
_BREAKABLE = (ast.Compare, ast.BinOp, ast.AugAssign, ast.Constant, ast.BoolOp, ast.If, ast.IfExp, ast.For)
KINDS = ("comparison", "arithmetic", "constant", "logic", "negation", "omission")


class Mutant(NamedTuple):
    """A mutated function.

    Attributes:
        kind: One of KINDS.
        source: Source of the function with the bug.
    """

    kind: str
    source: str


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a function, in a fixed order. Some may behave like the original."""
    found = []
    for number, node in enumerate(ast.walk(ast.parse(source))):
        for kind in KINDS if isinstance(node, _BREAKABLE) else ():
            tree = ast.parse(source)
            same = next(other for index, other in enumerate(ast.walk(tree)) if index == number)
            if _break(same, kind):
                found.append(Mutant(kind, ast.unparse(tree) + "\n"))
    return [mutant for mutant in dict.fromkeys(found) if mutant.source != normal_form(source)]


def normal_form(source: str) -> str:
    """The original source in the format of `mutants_of`."""
    return ast.unparse(ast.parse(source)) + "\n"


def _break(node: ast.AST, kind: str) -> bool:
    """Applies a mutation of this kind to a node. Returns False if it does not apply."""
    match node, kind:
        case ast.Compare(ops=[operator]), "comparison" if type(operator) in _COMPARISONS:
            node.ops = [_COMPARISONS[type(operator)]()]
        case ((ast.BinOp(op=operator) | ast.AugAssign(op=operator)), "arithmetic") if type(operator) in _ARITHMETIC:
            node.op = _ARITHMETIC[type(operator)]()
        case ast.Constant(value=int() as value), "constant" if not isinstance(value, bool):
            node.value = value + 1
        case ast.BoolOp(op=operator), "logic":
            node.op = ast.Or() if isinstance(operator, ast.And) else ast.And()
        case ((ast.If() | ast.IfExp()), "negation"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case ((ast.For() | ast.If()), "omission"):
            return _omit(node)
        case _:
            return False
    ast.fix_missing_locations(node)
    return True


def _omit(node: ast.For | ast.If) -> bool:
    """Removes the last statement of a block with several."""
    if len(node.body) < 2:
        return False
    node.body = node.body[:-1]
    return True
