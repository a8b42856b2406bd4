"""Libraries score the policy's text in a jail: it never runs as code, and cannot stop a run or write its own score."""

import threading
from dataclasses import replace

import pytest
from rl_runs import LETTERS, LettersEpisode, grpo_config, save_models, source

from openmimo.core.metrics import read_metrics
from openmimo.data.config import TaskConfig
from openmimo.data.task import open_task
from openmimo.data.tasks import _answers as answers
from openmimo.data.tasks._answers import score_answer
from openmimo.rl.run import train
from openmimo.runtime.isolated import calls
from openmimo.runtime.isolated.calls import Call, IsolatedCalls, isolated_calls
from openmimo.runtime.isolated.expressions import RefusedExpressionError, check_expression

EVALUATED = ("countdown", "puzzle24", "simple_integration", "polynomial_multiplication", "binary_matrix", "n_queens",
             "string_insertion", "spiral_matrix", "complex_arithmetic")  # fmt: skip


def attacks(path):
    """Answers that create a file or a score if a scorer runs them."""
    write = f"open({str(path)!r}, 'w')"
    return [
        f"__import__('os').system('touch {path}')",
        f"[{write}]",
        f"[c for c in ().__class__.__base__.__subclasses__()] and {write}",
        f'sympify("{write}")',
        f'lambdify([], \'__import__("os").system("touch {path}")\')()',
        f"(lambda: {write})()",
        f"exec('{path}')",
        "'%s' % globals()",
    ]


@pytest.mark.parametrize("dataset", EVALUATED)
def test_no_answer_to_a_library_task_runs(dataset, tmp_path):
    pytest.importorskip("reasoning_gym")
    task = open_task(TaskConfig("reasoning_gym", 1, 1, options={"dataset": dataset}))
    problem = task.problem_at(0, split="train", seed=0)
    assert task.score(problem, problem.answer) == 1.0
    for number, _ in enumerate(attacks("")):
        mark = tmp_path / f"made{number}"
        assert task.score(problem, attacks(mark)[number]) < 0.5
        assert not mark.exists()


def test_an_answer_without_end_scores_0_and_is_counted(monkeypatch):
    pytest.importorskip("math_verify")
    before = isolated_calls().counts["timed out"]
    with monkeypatch.context() as patch:
        patch.setattr(answers, "MATH_SECONDS", 0.3)
        assert score_answer("math", "5", "$9^{9^9}$") == 0.0
    assert isolated_calls().counts["timed out"] == before + 1
    assert score_answer("math", "1/2", "so it is $0.5$") == 1.0


def test_answers_are_scored_from_many_threads():
    pytest.importorskip("math_verify")
    found = {}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: score_answer("math", "4", f"${number}$")}))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: float(number == 4) for number in range(8)}


@pytest.fixture
def own_process(monkeypatch):
    """Isolated calls in a child process without a jail, which can import the test's own module."""
    monkeypatch.setattr(calls, "find_interpreter", refuse)
    with pytest.warns(UserWarning, match="without a jail: no Python here"):
        made = IsolatedCalls(1)
        assert made.run(Call("math:sqrt", (4.0,)), seconds=5).value == 2.0
    yield made
    made.close()


def refuse():
    raise calls.SandboxUnavailableError("no Python here")


def test_every_end_of_a_call_is_reported(own_process):
    assert own_process.run(Call("math:sqrt", (-1.0,)), seconds=5).ended == "raised"
    assert own_process.run(Call("time:sleep", (30,)), seconds=0.2).ended == "timed out"
    assert own_process.run(Call("os:abort", ()), seconds=5).ended == "died"
    assert own_process.run(Call("math:sqrt", (9.0,)), seconds=5).value == 3.0
    with pytest.raises(calls.JailError, match="no_such"):
        own_process.run(Call("math:no_such", ()), seconds=5)
    assert own_process.counts == {"returned": 2, "raised": 1, "timed out": 1, "died": 1}


@pytest.mark.parametrize("text", ["(1 + 2) * 3 ** 2", "sqrt(2) / 2", "[1, [2, 3]]", "x if 1 < 2 else y", "{'a': -1.5}"])
def test_expressions_are_allowed(text):
    check_expression(text)


@pytest.mark.parametrize(
    "text", [*attacks("/nowhere")[:7], "a.b", "f'{a}'", "(a := 1)", "[i for i in range(9)]", "_", "f()()"]
)
def test_other_text_is_refused(text):
    with pytest.raises(RefusedExpressionError):
        check_expression(text)


@pytest.mark.parametrize(
    ("key", "text", "tolerance", "expected"),
    [
        ("1234567", "1234568", 0.0, 0.0),
        ("1234567", "1234567.4", 1e-3, 0.0),
        ("1000000", "1000001.0", 1e-3, 0.0),
        ("1234567", "it is 1,234,567.", 0.0, 1.0),
        ("0.3333", "1/3", 0.0, 0.0),
        ("0.3333", "1/3", 1e-3, 1.0),
        ("5", "10-5", 0.0, 1.0),
        ("-5", "10 - 5", 0.0, 0.0),
        ("-5", "it is -5", 0.0, 1.0),
    ],
)
def test_numbers_agree_exactly_unless_a_tolerance_is_given(key, text, tolerance, expected):
    assert score_answer("numeric", key, text, tolerance=tolerance) == expected


class MathLetters(LettersEpisode):
    """An episode whose reward first scores an expression that cannot be evaluated in time."""

    def reward(self):
        assert score_answer("math", "5", "$9^{9^9}$") == 0.0
        return super().reward()


MATH_LETTERS = replace(LETTERS, open=MathLetters, is_instant=lambda options: False)


@pytest.mark.slow
def test_a_run_goes_on_and_its_metrics_count_the_time_outs(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(answers, "MATH_SECONDS", 0.3)
    save_models(tmp_path)
    own = source("math", "test_isolated_scoring:MATH_LETTERS", samples_per_prompt=2)
    config = grpo_config(tmp_path, tmp_path / "run", sources=(own,), steps=1, groups_per_step=2)
    train(config)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "scoring/timed_out" in row]
    assert rows[-1]["scoring/timed_out"] >= 2
