"""Contract of every task family.

The answer key is right, nonsense is wrong, no text raises an error, and a stream depends on its seed only.
"""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmimo.core.errors import ConfigError, DataError
from openmimo.data import tasks
from openmimo.data.config import TaskConfig
from openmimo.data.source import split_of
from openmimo.data.task import (
    FAMILIES,
    HELD_OUT_FRACTION,
    MAX_DRAWS,
    TaskFamily,
    open_task,
    problem_at,
    prompt_messages,
)

ADAPTERS = {"jsonl", "reasoning_gym"}  # have tests of their own: they need a file or a library
NAMES = [name for name in FAMILIES.names() if name not in ADAPTERS]
VARIANTS = [(name, {}) for name in NAMES] + [
    ("addition", {"reversed_answer": False, "terms": 3}),
    ("sorting", {"descending": True}),
    ("lookup", {"hops": 2}),
    ("parity", {"scratchpad": True}),
    ("modular", {"max_modulus": 0}),
    ("program", {"reward": "soft"}),
    ("program", {"reward": "all", "num_groups": 1}),
]
EASIEST = {name: FAMILIES.get(name).difficulties[0] for name in NAMES}


def levels_of(name: str) -> list[int]:
    """The first levels and the last one."""
    difficulties = FAMILIES.get(name).difficulties
    return [*difficulties[:4], difficulties[-1]]


def task_of(name: str, options: dict, difficulty: int | None = None):
    difficulty = EASIEST[name] if difficulty is None else difficulty
    return open_task(TaskConfig(name, difficulty, difficulty, options=options))


def test_every_file_of_the_folder_is_a_family():
    files = {path.stem for path in Path(tasks.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert set(FAMILIES.names()) == files
    assert all(isinstance(FAMILIES.get(name), TaskFamily) for name in files)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_reference_answer_is_right_and_others_are_wrong(name, options):
    for difficulty in levels_of(name):
        task = task_of(name, options, difficulty)
        for index in range(20):
            problem = task.problem_at(index, split="train", seed=0)
            assert (problem.family, problem.difficulty) == (name, difficulty)
            assert task.score(problem, problem.answer) == 1.0
            assert task.score(problem, f" {problem.answer}\n") == 1.0
            assert task.score(problem, f"some thoughts</think>{problem.answer}") == 1.0
            for wrong in ("", "nonsense", problem.answer + "?", problem.answer + "0;", f"{problem.answer}</think>"):
                assert task.score(problem, wrong) < 1.0


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_answers_to_other_problems_are_mostly_wrong(name, options):
    task = task_of(name, options, levels_of(name)[3])
    problems = [task.problem_at(index, split="train", seed=0) for index in range(60)]
    right = sum(task.score(problems[i], problems[i - 1].answer) == 1.0 for i in range(1, 60))
    assert right <= 45


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="0123456789+-*/()=,;?[]{}<>&|! abcdeinrtv", max_size=60)))
def test_no_text_breaks_the_scorer(name, text):
    task = task_of(name, {}, levels_of(name)[1])
    score = task.score(task.problem_at(0, split="train", seed=0), text)
    assert isinstance(score, float) and 0.0 <= score <= 1.0


@pytest.mark.parametrize(
    "text", ["(" * 5000, "-" * 5000, "9" * 5000, "rev;" * 5000, "dup;" * 60 + "rev", "²", "1\x00", "\ud800", "1/0"]
)
@pytest.mark.parametrize("name", NAMES)
def test_no_hostile_text_breaks_the_scorer(name, text):
    task = task_of(name, {})
    assert task.score(task.problem_at(0, split="train", seed=0), text) in (0.0, 0.25, 0.5, 0.75)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_stream_is_a_function_of_index_split_and_seed(name, options):
    config = TaskConfig(name, *sorted(levels_of(name)[1:3]), options=options)
    first = [problem_at(config, index, split="train", seed=3) for index in range(40)]
    again = [problem_at(config, index, split="train", seed=3) for index in reversed(range(40))]
    assert first == again[::-1]
    assert [problem.id for problem in first] == [problem.id for problem in again[::-1]]
    other = [problem_at(config, index, split="train", seed=4) for index in range(40)]
    assert [problem.prompt for problem in other] != [problem.prompt for problem in first]
    assert {problem.difficulty for problem in first} == {config.min_difficulty, config.max_difficulty}


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_both_are_there(name):
    task = task_of(name, {})
    number = 100 if name == "program" else 1000
    prompts = {
        split: {task.problem_at(index, split=split, seed=seed).prompt for seed in (0, 1) for index in range(number)}
        for split in ("train", "validation")
    }
    assert prompts["train"] and prompts["validation"]
    assert not prompts["train"] & prompts["validation"]


@pytest.mark.parametrize("name", NAMES)
def test_every_level_has_held_out_problems(name):
    for difficulty in FAMILIES.get(name).difficulties:
        assert task_of(name, {}, difficulty).problem_at(0, split="validation", seed=0).prompt


@pytest.mark.parametrize("name", NAMES)
def test_a_tenth_is_held_out_and_ids_tell_prompts_apart(name):
    task = task_of(name, {}, FAMILIES.get(name).difficulties[-1])
    rng = random.Random(0)
    problems = [task.family.make(rng, task.config.max_difficulty, task.options) for _ in range(150)]
    prompts = {problem.prompt for problem in problems}
    assert len({problem.id for problem in problems}) == len(prompts) > 145
    held_out = sum(split_of(prompt, HELD_OUT_FRACTION) == "validation" for prompt in prompts)
    assert 0.04 < held_out / len(prompts) < 0.17


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_problems_grow_with_difficulty(name, options):
    def mean_length(difficulty):
        task = task_of(name, options, difficulty)
        problems = [task.problem_at(index, split="train", seed=0) for index in range(30)]
        return sum(len(problem.prompt) + len(problem.answer) for problem in problems) / len(problems)

    lengths = [mean_length(difficulty) for difficulty in levels_of(name)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


@pytest.mark.parametrize("name", NAMES)
def test_easy_problems_are_short(name):
    task = task_of(name, {})
    for index in range(100):
        problem = task.problem_at(index, split="train", seed=0)
        assert len(problem.prompt) <= (32 if name == "program" else 24) and len(problem.answer) <= 14


@pytest.mark.parametrize("name", FAMILIES.names())
def test_family_says_what_it_is_and_refuses_unknown_options(name):
    family = FAMILIES.get(name)
    assert family.describe
    with pytest.raises(ConfigError, match="no_such_option"):
        open_task(TaskConfig(name, *[family.difficulties[0]] * 2, options={"no_such_option": 1}))
    with pytest.raises(ConfigError, match=f"it has {family.difficulties[0]} to {family.difficulties[-1]}"):
        open_task(TaskConfig(name, family.difficulties[0], family.difficulties[-1] + 1))


def test_impossible_tasks_are_refused():
    with pytest.raises(ConfigError, match="min_difficulty 3 above max_difficulty 2"):
        TaskConfig("addition", 3, 2)
    with pytest.raises(ConfigError, match="weight"):
        TaskConfig("addition", weight=0.0)
    with pytest.raises(ConfigError, match="no TaskFamily called 'additions'"):
        open_task(TaskConfig("additions"))


def test_too_few_prompts_are_reported():
    task = task_of("reverse", {"num_letters": 2}, 2)  # it has four prompts, too few to hold some out
    with pytest.raises(DataError, match=f"none of {MAX_DRAWS} draws is in the 'validation' split"):
        task.problem_at(0, split="validation", seed=0)


def test_problems_need_no_global_random_numbers():
    random.seed(1)
    before = problem_at(TaskConfig("boolean", 5, 5), 7, split="train", seed=0)
    random.seed(2)
    assert problem_at(TaskConfig("boolean", 5, 5), 7, split="train", seed=0) == before


def test_prompt_messages_have_a_system_turn():
    problem = problem_at(TaskConfig("addition"), 0, split="train", seed=0)
    assert [(m.role, m.content) for m in prompt_messages(problem)] == [("system", ""), ("user", problem.prompt)]
