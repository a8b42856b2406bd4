"""Problems from outside the package: JSON Lines files, the library reasoning-gym, and math-verify as a scorer."""

import json
import sys
import threading

import pytest

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.config import TaskConfig
from openmimo.data.source import split_of
from openmimo.data.task import Problem, open_task, prompt_messages
from openmimo.data.tasks._answers import score_answer

ROWS = [
    {"prompt": f"What is {number} + 1?", "answer": number + 1, "difficulty": 1 + number % 2, "id": f"sum-{number}"}
    for number in range(60)
]


@pytest.fixture
def write(tmp_path):
    def write_lines(rows, **options):
        path = tmp_path / "own.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path), **options}

    return write_lines


def without(monkeypatch, package: str) -> None:
    """Makes a package unimportable."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def test_own_problems_by_difficulty_and_split(write):
    task = open_task(TaskConfig("jsonl", 2, 2, options=write(ROWS, scoring="numeric")))
    ids = {split: {task.problem_at(index, split=split, seed=0).id for index in range(400)}
           for split in ("train", "validation")}  # fmt: skip
    assert not ids["train"] & ids["validation"]
    assert ids["train"] | ids["validation"] == {row["id"] for row in ROWS if row["difficulty"] == 2}
    problem = task.problem_at(0, split="train", seed=0)
    assert task.score(problem, f"It is {problem.answer}.") == 1.0
    assert task.score(problem, "It is 100.") == 0.0


def test_every_problem_comes_once_an_epoch_in_an_order_of_its_own(write):
    task = open_task(TaskConfig("jsonl", 1, 2, options=write(ROWS)))
    held_out = {task.problem_at(index, split="validation", seed=0).id for index in range(60)}
    size = len(ROWS) - len(held_out)
    epochs = [
        [task.problem_at(epoch * size + place, split="train", seed=3).id for place in range(size)] for epoch in range(3)
    ]
    assert all(sorted(epoch) == sorted({row["id"] for row in ROWS} - held_out) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [task.problem_at(place, split="train", seed=4).id for place in range(size)] != epochs[0]
    again = open_task(TaskConfig("jsonl", 1, 2, options=write(ROWS)))
    assert [again.problem_at(size + place, split="train", seed=3).id for place in range(5)] == epochs[1][:5]


def test_equal_prompts_are_on_one_side(write):
    rows = [{"prompt": f"p{number % 30}", "answer": "a"} for number in range(120)]
    task = open_task(TaskConfig("jsonl", 1, 1, options=write(rows)))
    train, held_out = (
        {task.problem_at(index, split=split, seed=0).prompt for index in range(200)}
        for split in ("train", "validation")
    )
    assert train and held_out and not train & held_out


def test_a_test_file_is_validated_on_and_its_problems_are_not_trained_on(write, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:5], {"prompt": "other", "answer": 1}]))
    task = open_task(TaskConfig("jsonl", 1, 2, options=write(ROWS, test_path=str(test))))
    train, held_out = (
        {task.problem_at(index, split=split, seed=0).prompt for index in range(100)}
        for split in ("train", "validation")
    )
    assert held_out == {row["prompt"] for row in ROWS[:5]} | {"other"}
    assert train == {row["prompt"] for row in ROWS[5:]}


def test_a_set_that_cannot_be_divided_is_refused(write):
    task = open_task(TaskConfig("jsonl", 1, 1, options=write([{"prompt": "only", "answer": "a"}])))
    split = "validation" if split_of("only", 0.1) == "train" else "train"
    with pytest.raises(DataError, match="None of the 1 problems of .*own.jsonl.*test_path"):
        task.problem_at(0, split=split, seed=0)


def test_problems_of_several_turns(write):
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "+1?"},
    ]
    rows = [{"messages": turns, "answer": 3, "system": "Be brief."}, {"prompt": "p", "answer": "a", "system": "s"}]
    task = open_task(TaskConfig("jsonl", 1, 1, options=write(rows, test_path=write(rows)["path"])))
    found = {
        tuple(
            (turn.role, turn.content) for turn in prompt_messages(task.problem_at(i, split="validation", seed=0), "x")
        )
        for i in range(2)
    }
    assert found == {
        (("system", "Be brief."), *((turn["role"], turn["content"]) for turn in turns)),
        (("system", "s"), ("user", "p")),
    }


def test_problems_without_difficulty_belong_to_all(write):
    options = write([{"question": f"q{number}", "key": "a"} for number in range(30)],
                    prompt_field="question", answer_field="key")  # fmt: skip
    problem = open_task(TaskConfig("jsonl", 7, 7, options=options)).problem_at(0, split="train", seed=0)
    assert problem.prompt.startswith("q") and problem.answer == "a" and problem.difficulty == 7
    assert problem.id == Problem("jsonl", 1, problem.prompt, "").id


def test_missing_difficulty_is_named(write):
    with pytest.raises(DataError, match="no problem of difficulty 5; it has 1, 2"):
        open_task(TaskConfig("jsonl", 5, 5, options=write(ROWS))).problem_at(0, split="train", seed=0)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"answer": "1"}, "line 1: no text or number under 'prompt'"),
        ({"prompt": "p", "answer": None}, "line 1: no text or number under 'answer'"),
        ({"prompt": "p", "answer": "a", "difficulty": "easy"}, "line 1: the difficulty must be a whole number"),
        ([1], "line 1: expected a JSON object in each line, found a list"),
        ({"prompt": "p", "answer": 1e999}, "line 1: not valid JSON .*Infinity"),
        ({"prompt": "p", "answer": "a", "id": {}}, "line 1: the id must be"),
        ({"prompt": "p", "messages": [{"role": "user", "content": "a"}], "answer": "a"}, "line 1: there are both"),
        ({"messages": [{"role": "assistant", "content": "a"}], "answer": "a"}, "line 1: the last turn"),
        ({"messages": "hi", "answer": "a"}, "line 1: 'messages' must be a list"),
        ({"prompt": "\ud83d", "answer": "a"}, "line 1: .*'prompt'.*lone surrogate"),
    ],
)
def test_bad_lines_are_named(write, row, named):
    task = open_task(TaskConfig("jsonl", 1, 1, options=write([row])))
    with pytest.raises(DataError, match=named):
        task.problem_at(0, split="train", seed=0)


def test_math_without_its_package_says_what_to_install(write, monkeypatch):
    without(monkeypatch, "math_verify")
    task = open_task(TaskConfig("jsonl", 1, 1, options=write(ROWS, scoring="math")))
    with pytest.raises(ConfigError, match="pip install math-verify"):
        task.problem_at(0, split="train", seed=0)


def test_reasoning_gym_without_its_package_says_what_to_install(monkeypatch):
    without(monkeypatch, "reasoning_gym")
    task = open_task(TaskConfig("reasoning_gym", 1, 1, options={"dataset": "no_such_set"}))
    with pytest.raises(ConfigError, match="pip install reasoning-gym"):
        task.problem_at(0, split="train", seed=0)


MATH_CASES = [
    (r"\frac{1}{2}", "0.5", 1.0), (r"\frac{1}{2}", r"so it is $\frac{2}{4}$", 1.0), ("x+1", "$1+x$", 1.0),
    ("7", r"\boxed{7}", 1.0), ("7", r"<think>8</think>The answer is \boxed{7}.", 1.0), ("7", "8", 0.0), ("7", "", 0.0),
    (r"\sqrt{8}", r"$2\sqrt{2}$", 1.0), ("7", r"\frac{", 0.0), ("7", "$" * 50, 0.0), ("7", "\x00", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "text", "right"), MATH_CASES)
def test_math_scoring(answer, text, right):
    pytest.importorskip("math_verify")
    assert score_answer("math", answer, text) == right


def test_math_scoring_works_in_threads():
    pytest.importorskip("math_verify")
    scores = []
    thread = threading.Thread(target=lambda: scores.append(score_answer("math", "1/2", "0.5")))
    thread.start()
    thread.join()
    assert scores == [1.0]


@pytest.mark.parametrize("dataset", ["chain_sum", "spell_backward", "basic_arithmetic", "letter_counting"])
def test_reasoning_gym_problems(dataset):
    pytest.importorskip("reasoning_gym")
    for difficulty in (1, 2):
        task = open_task(TaskConfig("reasoning_gym", difficulty, difficulty, options={"dataset": dataset}))
        problems = [task.problem_at(index, split="train", seed=0) for index in range(10)]
        assert problems == [task.problem_at(index, split="train", seed=0) for index in range(10)]
        held_out = {task.problem_at(index, split="validation", seed=0).prompt for index in range(10)}
        assert not held_out & {problem.prompt for problem in problems}
        for problem in problems[:4]:
            assert task.score(problem, f"<think>easy</think>{problem.answer}") == 1.0
            for text in ("", "nonsense", "\x00", "9" * 999):
                assert 0.0 <= task.score(problem, text) < 1.0


def test_reasoning_gym_difficulty_grows():
    pytest.importorskip("reasoning_gym")

    def mean_length(difficulty):
        task = open_task(TaskConfig("reasoning_gym", difficulty, difficulty, options={"dataset": "chain_sum"}))
        return sum(len(task.problem_at(index, split="train", seed=0).prompt) for index in range(30))

    assert mean_length(1) < mean_length(2) < mean_length(4)


def test_reasoning_gym_names_its_data_sets():
    pytest.importorskip("reasoning_gym")
    task = open_task(TaskConfig("reasoning_gym", 1, 1, options={"dataset": "no_such_set"}))
    with pytest.raises(ConfigError, match="no data set 'no_such_set'; it has .*chain_sum"):
        task.problem_at(0, split="train", seed=0)
