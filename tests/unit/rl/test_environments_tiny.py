"""Calculator and store: environments for tiny models that insert results into the text."""

import pytest

from openmimo.data.tasks._arithmetic import evaluate
from openmimo.rl.agents.environment import ENVIRONMENTS
from openmimo.rl.scheduling.problems import Problem


def open_sum(expression, **options):
    plugin = ENVIRONMENTS.get("calculator")
    from openmimo.rl.environments.calculator import Sum

    return plugin.open(Problem("x", Sum(expression, str(evaluate(expression)[0]))), plugin.options(**options))


def open_chores(prompt, before, after):
    plugin = ENVIRONMENTS.get("store")
    from openmimo.rl.environments.store import Chores

    return plugin.open(Problem("x", Chores(prompt, tuple(before.items()), tuple(after.items()))), plugin.options())


def test_calculator_inserts_results():
    episode = open_sum("(12*7)-90")
    assert episode.stop == ("</c>",)
    assert episode.respond("First <c>12*7</c>").text == "=84;"
    assert episode.respond("<c>84-90</c>\n").text == "=-6;"
    assert episode.respond("<c>-6*3</c>").text == "=-18;"
    assert episode.respond(" -6 ").is_last
    assert episode.reward() == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<c>12*7-90</c>", "at most 1 at once"),
        ("<c>12**7</c>", "number is missing"),
        ("<c>12/0</c>", "divides by zero"),
        ("<c>import os</c>", "number is missing"),
        ("<c></c>", "number is missing"),
        ("12*7</c>", "there is no <c>"),
    ],
)
def test_calculator_tells_mistakes(text, expected):
    answer = open_sum("12*7").respond(text)
    assert answer.text.startswith("=error: ")
    assert expected in answer.text


def test_calculator_takes_whole_expressions_if_allowed():
    episode = open_sum("(12*7)-90", operations_per_call=0)
    assert episode.respond("<c>(12*7)-90</c>").text == "=-6;"


def test_a_wrong_or_unfinished_sum_earns_nothing():
    episode = open_sum("12*7")
    episode.respond("85")
    assert episode.reward() == 0.0
    episode = open_sum("12*7")
    assert episode.respond("<c>12*7").is_last
    assert episode.reward() == 0.0


def test_difficulty_is_the_number_of_operations():
    plugin = ENVIRONMENTS.get("calculator")
    for level in (1, 5, 12):
        problems = plugin.problems(plugin.options(min_difficulty=level, max_difficulty=level), "train", 0)
        for index in range(20):
            content = problems(index).content
            value, numbers = evaluate(content.expression)
            assert len(numbers) == level + 1
            assert str(value) == content.answer


def test_distinct_problems_go_round():
    plugin = ENVIRONMENTS.get("store")
    problems = plugin.problems(plugin.options(distinct=3), "train", 0)
    ids = [problems(index).id for index in range(9)]
    assert ids[:3] * 3 == ids
    assert len(set(ids)) == 3


def test_store_is_judged_by_its_state():
    episode = open_chores("copy a b", {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "1", "c": "3"})
    assert episode.stop == (">",)
    assert episode.respond("I look: <get a>").text == "=1;"
    assert episode.respond("<set b 1>").text == "=ok;"
    assert episode.reward() == 1.0
    assert episode.respond("<set c 4>").text == "=ok;"
    assert episode.respond("done").is_last
    assert episode.reward() == 0.0


@pytest.mark.parametrize("text", ["<get z>", "<set z 1>", "<get>", "<set a>", "<set a 1 2>", "<put a>", ">", "<>"])
def test_store_tells_mistakes(text):
    episode = open_chores("copy a b", {"a": "1", "b": "2"}, {"a": "1", "b": "1"})
    assert episode.respond(text).text.startswith("=error: ")


def test_doing_nothing_is_never_right():
    plugin = ENVIRONMENTS.get("store")
    problems = plugin.problems(plugin.options(min_difficulty=1, max_difficulty=8, keys=3), "train", 0)
    assert all(problem.content.before != problem.content.after for problem in map(problems, range(100)))
