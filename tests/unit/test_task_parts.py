"""Parts of task families (arithmetic, the mini language, answer comparison), and rules of single families."""

import ast
import operator
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmimo.core.errors import ConfigError
from openmimo.data.config import TaskConfig
from openmimo.data.task import Problem, open_task
from openmimo.data.tasks import program
from openmimo.data.tasks._answers import final_answer, last_number, score_answer
from openmimo.data.tasks._arithmetic import ExpressionError, evaluate
from openmimo.data.tasks._mini_language import MAX_STEPS, ProgramError, parse, random_operation, run, to_text

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def oracle(node: ast.AST) -> Fraction:
    """The value of a parsed Python expression."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](oracle(node.left), oracle(node.right))
    if isinstance(node, ast.UnaryOp):
        return -oracle(node.operand)
    return Fraction(node.value)


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_arithmetic_agrees_with_python(text):
    try:
        expected = oracle(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(ExpressionError, match="divides by zero"):
            evaluate(text)
        return
    value, numbers = evaluate(f" {text} ")
    assert value == expected
    constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert sorted(numbers) == sorted(constants)


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("007+0", 7, [7, 0]), ("1 2 * 00", 0, [12, 0]), ("-" * 40 + "1", 1, [1]), ("(" * 40 + "1" + ")" * 40, 1, [1]),
        ("+".join("-(-1)" for _ in range(33)), 33, [1] * 33), ("-2*-3", 6, [2, 3]),
        ("9" * 200, 10**200 - 1, [10**200 - 1]),
    ],
)  # fmt: skip
def test_arithmetic_that_python_writes_in_another_way(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    ["", "1+", "(1", "1)", "2**3", "1=1", "+1", "a", "1.5", "1//2", "²", "(" * 99, "-" * 99, "()", "1(2)", "(1,2)",
     "1_0", "0x1", "1e3", "1j", "1if", "1#", "-" * 41 + "1", "(" * 41 + "1" + ")" * 41, "1" * 201],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


@pytest.mark.parametrize(
    ("text", "digits", "expected"),
    [
        ("rev", "312", "213"), ("sort", "312", "123"), ("uniq", "3313", "31"), ("dup", "12", "1212"),
        ("odd", "12345", "135"), ("even", "12345", "24"), ("inc3", "189", "412"), ("mul2", "345", "680"),
        ("take2", "345", "34"), ("take9", "345", "345"), ("drop2", "345", "5"), ("drop9", "345", ""),
        ("rot1", "345", "453"), ("rot4", "345", "453"), ("rot1", "", ""), ("rev;inc1;take2", "123", "43"),
        (" rev ; inc1 ", "12", "32"),
    ],
)  # fmt: skip
def test_operations(text, digits, expected):
    assert run(parse(text), digits) == expected


@pytest.mark.parametrize(
    "text", ["", ";", "rev;", "rev2", "inc", "inc12", "nothing", "rev,inc1", "Rev", "inc-1", "take²"]
)
def test_what_is_no_program_is_refused(text):
    with pytest.raises(ProgramError, match="is not an operation"):
        parse(text)


def test_every_program_ends():
    with pytest.raises(ProgramError, match="more than"):
        run(parse(";".join(["dup"] * 200)), "1")
    with pytest.raises(ProgramError, match="more than"):
        run(parse(";".join(["rev"] * (MAX_STEPS + 1))), "")
    assert run(parse(";".join(["rev"] * MAX_STEPS)), "") == ""


def test_programs_survive_being_written():
    rng = random.Random(0)
    for _ in range(100):
        made = tuple(random_operation(rng) for _ in range(4))
        assert parse(to_text(made)) == made


def test_program_rewards_differ_as_they_should():
    tests = tuple((digits, digits[::-1]) for digits in ("1", "2", "12", "123"))
    groups = ((0, 2), (1, 3))

    def score(reward, text):
        meta = {"tests": tests, "groups": groups, "reward": reward}
        return program.score(Problem("program", 1, "prog", "rev", meta=meta), text)

    assert [score(reward, "rev") for reward in ("strict", "soft", "all")] == [1.0, 1.0, 1.0]
    # the identity passes tests 0 and 1 only: half of each group
    assert [score(reward, "inc0") for reward in ("strict", "soft", "all")] == [0.0, 0.5, 0.0]
    # descending sort is right for all tests, though it is another program
    assert score("all", "sort;rev") == 1.0
    # right on "12" but not on "123"
    assert [score(reward, "rot1") for reward in ("strict", "soft", "all")] == [0.5, 0.75, 0.0]
    assert program.passed_tests(Problem("program", 1, "p", "rev", meta={"tests": tests}), "?") == (False,) * 4


def test_programs_have_no_idle_operation():
    task = open_task(TaskConfig("program", 3, 3))
    for index in range(50):
        problem = task.problem_at(index, split="train", seed=0)
        operations = problem.answer.split(";")
        for place in range(3):
            assert task.score(problem, ";".join(operations[:place] + operations[place + 1 :])) < 1.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3*5+7", 1.0),
        ("7+5*3", 1.0),
        ("(7+3*5)", 1.0),
        ("22", 0.0),
        ("3*5+7+0", 0.0),
        ("5+7+3", 0.0),
        ("3*5+7=22", 0.0),
    ],
)
def test_countdown_takes_any_way_to_the_target(text, right):
    problem = Problem("countdown", 3, "3,7,5=22", "3*5+7", meta={"numbers": (3, 7, 5), "target": 22})
    assert open_task(TaskConfig("countdown", 3, 3)).score(problem, text) == right


def test_countdown_counts_every_number():
    problem = Problem("countdown", 3, "2,2,4=8", "2+2+4", meta={"numbers": (2, 2, 4), "target": 8})
    task = open_task(TaskConfig("countdown", 3, 3))
    assert [task.score(problem, text) for text in ("4*2", "2*2+4", "4/2*4", "2*(4/2)*2")] == [0.0, 1.0, 0.0, 0.0]


def test_boolean_agrees_with_python():
    task = open_task(TaskConfig("boolean", 1, 8))
    for index in range(200):
        problem = task.problem_at(index, split="train", seed=0)
        python = problem.prompt.replace("!", " not ").replace("0", "False").replace("1", "True")
        python = python.replace("&", " and ").replace("|", " or ")
        if "^" not in python:  # `not` has another precedence in Python
            assert str(int(eval(python))) == problem.answer  # noqa: S307


def test_base_conversion_agrees_with_python():
    task = open_task(TaskConfig("base_conversion", 1, 6))
    for index in range(100):
        problem = task.problem_at(index, split="train", seed=0)
        number, base = problem.prompt.split(">b")
        assert int(problem.answer, int(base)) == int(number)


def test_parity_scores_the_answer_and_not_the_scratchpad():
    task = open_task(TaskConfig("parity", 6, 6, options={"scratchpad": True}))
    problem = Problem("parity", 4, "par 1011", "1101=1")  # a length below the levels, for brevity
    assert [task.score(problem, text) for text in ("1", "1101=1", "0000=1", "1101=0", "1101")] == [1.0, 1.0, 1.0, 0, 0]


def test_two_hops_lead_to_the_value():
    task = open_task(TaskConfig("lookup", 1, 8, options={"hops": 2}))
    for index in range(100):
        problem = task.problem_at(index, split="train", seed=0)
        pairs, asked = problem.prompt.split("?")
        table = dict(pairs.split(","))
        assert table[table[asked]] == problem.answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 42.", 42), ("1,234.5", Fraction("1234.5")), ("first 3 then -4", -4), ("x = 3/4", Fraction(3, 4)),
        ("2e3", 2000), (".5", Fraction(1, 2)), ("none", None), ("1/0", None), ("", None), ("9" * 400, int("9" * 400)),
    ],
)  # fmt: skip
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("method", "answer", "text", "right"),
    [
        ("exact", "New  York", " new york.", 1.0), ("exact", "a", "b", 0.0), ("exact", "a", "<think>b</think>a", 1.0),
        ("contains", "paris", "It is Paris, of course.", 1.0), ("contains", "4", "it is 42", 0.0),
        ("numeric", "0.5", "so 1/2", 1.0), ("numeric", "3", "3.0000000001", 0.0), ("numeric", "3", "3.1", 0.0),
        ("numeric", "3", "", 0.0), ("numeric", "1e999", "9" * 900, 0.0), ("numeric", "none", "none", 0.0),
    ],
)  # fmt: skip
def test_score_answer(method, answer, text, right):
    assert score_answer(method, answer, text) == right


@given(answer=st.text(max_size=30), text=st.text(max_size=60))
def test_no_text_breaks_a_comparison(answer, text):
    for method in ("exact", "contains", "numeric"):
        assert score_answer(method, answer, text) in (0.0, 1.0)


def test_unknown_scoring_is_refused():
    with pytest.raises(ConfigError, match="no scoring 'vibes'"):
        score_answer("vibes", "1", "1")


def test_final_answer_comes_after_the_last_thought():
    assert final_answer("<think>1</think>no</think> 2 ") == "2"
