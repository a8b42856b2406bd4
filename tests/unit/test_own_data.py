"""The user's own texts, conversations, problems, rewards and environments, named on the command line."""

import gzip
import json
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from rl_runs import grpo_config, save_models, source

from openmimo import cli
from openmimo.arguments import UsageError
from openmimo.core import config as config_io
from openmimo.core.errors import ConfigError, DataError, UserError
from openmimo.core.metrics import read_metrics
from openmimo.core.registry import load_object
from openmimo.data.config import SourceConfig, TaskConfig
from openmimo.data.source import SyntheticSource, TextSource, open_source, read_documents
from openmimo.data.task import open_task
from openmimo.data.text_files import text_source
from openmimo.rl.config import MopdConfig, RlConfig
from openmimo.train.config import ExtendConfig, PretrainConfig, SftConfig

REWARD = """
def score(problem, text):
    return 1.0 if len(text) == problem["letters"] else 0.25
"""
ENVIRONMENT = """
from dataclasses import dataclass
import my_words
from openmimo.core.records import Message
from openmimo.rl.agents.environment import Environment, EnvResponse
from openmimo.rl.scheduling.problems import Problem

@dataclass(frozen=True)
class Options:
    good: str = "e"

class Echo:
    tools = stop = ()
    def __init__(self, problem, options):
        self.messages, self.good, self.text = (Message("user", problem.content),), options.good, ""
    def respond(self, text):
        self.text = text
        return EnvResponse()
    def reward(self):
        return min(1.0, sum(letter in self.good for letter in self.text) / 8)
    def close(self):
        pass

PLUGIN = Environment("echo", Options, lambda options, split, seed: lambda index: Problem(
    f"{split} {index}", my_words.WORDS[index % 3]), Echo)
"""


def write_lines(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def resolved(verb: str, config_type: type, *arguments: str):
    return cli._with_overrides(verb, ["tiny_cpu", *arguments], config_type)


def text_sources(mixture) -> list[SourceConfig]:
    return [config for config in mixture.sources if isinstance(open_source(config)[0], TextSource)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, which is not among those that Python searches for modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


@pytest.fixture
def data(folder):
    (folder / "my.txt").write_text("first line\nsecond line\n")
    write_lines(folder / "my.jsonl", {"text": "one"}, {"text": "two"})
    write_lines(folder / "bodies.jsonl", {"body": "one", "text": "other"})
    pyarrow.parquet.write_table(pyarrow.table({"text": ["uno", "dos"]}), folder / "my.parquet")
    (folder / "my.csv").write_text("text\none\n")
    (folder / "books").mkdir()
    (folder / "books" / "a.md").write_text("a book")
    (folder / "books" / "b.txt").write_text("another")
    return folder


@pytest.mark.parametrize(
    ("path", "field", "texts"),
    [
        ("my.txt", None, ["first line\nsecond line\n"]),
        ("my.jsonl", None, ["one", "two"]),
        ("bodies.jsonl", "body", ["one"]),
        ("my.parquet", None, ["uno", "dos"]),
        ("books", None, ["a book", "another"]),
    ],
)
def test_texts_are_recognized_by_their_suffix(data, path, field, texts):
    assert list(read_documents(text_source(path, field))) == texts


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.txt", "does not exist"),
        ("", "does not exist"),
        ("my.csv", "not read as texts"),
        (".", "several kinds"),
    ],
)
def test_other_files_are_refused(data, name, message):
    with pytest.raises(DataError, match=message):
        text_source(name)


def test_compressed_texts_are_recognized_by_the_suffix_before(folder):
    contents = {"my.jsonl.gz": '{"text": "one"}', "c4.json.gz": '{"text": "two"}', "my.txt.gz": "three"}
    for name, content in contents.items():
        (folder / name).write_bytes(gzip.compress(content.encode()))
    assert [text for name in contents for text in read_documents(text_source(name))] == ["one", "two", "three"]
    (folder / "my.txt.gz").unlink()
    assert list(read_documents(text_source("."))) == ["two", "one"]


def test_own_texts_take_the_place_of_the_recipe_s_texts(data):
    recipe = resolved("pretrain", PretrainConfig)
    config = resolved("pretrain", PretrainConfig, "--data", "my.jsonl", "--stages.1.steps", "500")
    assert config.stages[1].steps == 500
    for before, now in zip(recipe.stages, config.stages, strict=True):
        assert [source.options for source in text_sources(now.mixture)] == [
            {"path": "my.jsonl", "field": "text"} for _ in text_sources(before.mixture)
        ]
        assert sum(source.weight for source in now.mixture.sources) == pytest.approx(
            sum(source.weight for source in before.mixture.sources)
        )
        generated = [source for source in before.mixture.sources if source not in text_sources(before.mixture)]
        assert [source for source in now.mixture.sources if source not in text_sources(now.mixture)] == generated
    extended = resolved("extend", ExtendConfig, "--data=books")
    assert [source.options["path"] for source in text_sources(extended.mixture)] == ["books"]


def test_own_conversations_replace_the_recipe_s_data(folder):
    write_lines(folder / "chats.jsonl", {"messages": []})
    config = resolved(
        "sft", SftConfig, "--data", "chats.jsonl", "--mixture.sources.0.options.thinking", "off", "--steps", "47"
    )
    assert config.steps == 47
    assert [(s.name, s.options) for s in config.mixture.sources] == [
        ("chat", {"path": "chats.jsonl", "thinking": "off"})
    ]
    assert isinstance(open_source(config.mixture.sources[0])[0], SyntheticSource)


def test_from_and_own_data_go_together(data):
    config_io.save(resolved("pretrain", PretrainConfig, "--seed", "5"), data / "old.json")
    config = cli._with_overrides("pretrain", ["--from", "old.json", "--data", "my.txt"], PretrainConfig)
    assert config.seed == 5
    assert text_sources(config.stages[1].mixture)[0].options == {"path": "my.txt"}


@pytest.mark.parametrize(
    ("verb", "config_type", "arguments", "message"),
    [
        ("pretrain", PretrainConfig, ["--data-field", "x"], "--data-field has no effect without --data"),
        ("pretrain", PretrainConfig, ["--data", "my.txt", "--data-field", "x"], "plain text"),
        ("pretrain", PretrainConfig, ["--data"], "--data needs a value"),
        ("pretrain", PretrainConfig, ["--data", "--seed", "1"], "--data needs a value"),
        ("pretrain", PretrainConfig, ["--data="], "empty value"),
        ("pretrain", PretrainConfig, ["--problems", "x"], "--problems"),
        ("sft", SftConfig, ["--data", "my.csv"], "one JSON object per line"),
        ("sft", SftConfig, ["--data", "nope.jsonl"], "no such file"),
        ("sft", SftConfig, ["--environment-options.a", "1"], "options of openmimo rl"),
        ("rl", RlConfig, ["--reward", "r.py:f"], "--reward has no effect without --problems"),
        ("rl", RlConfig, ["--scoring", "math"], "--scoring has no effect without --problems"),
        ("rl", RlConfig, ["--environment-options.a", "1"], "no effect without --environment"),
        ("rl", RlConfig, ["--problems", "my.jsonl", "--environment", "e.py:E"], "exclude each other"),
        ("rl", RlConfig, ["--problems", "my.jsonl", "--reward", "r.py:f", "--scoring", "math"], "exclude each other"),
        ("rl", RlConfig, ["--problems", "my.jsonl", "--scoring", "vague"], "'exact', 'contains', 'numeric', 'math'"),
        ("rl", RlConfig, ["--problems", "nope.jsonl"], "no such file"),
        ("mopd", MopdConfig, ["--problems", "nope.jsonl"], "--problems"),
    ],
)
def test_contradictions_are_refused(data, verb, config_type, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolved(verb, config_type, *arguments)


def test_own_problems_become_one_source_with_the_recipe_s_batch(folder):
    write_lines(folder / "sums.jsonl", *({"prompt": f"1 + {n}", "answer": 1 + n} for n in range(40)))
    write_lines(folder / "test.jsonl", {"prompt": "2 + 2", "answer": 4})
    config = resolved(
        "rl", RlConfig, "--problems", "sums.jsonl", "--test-problems", "test.jsonl", "--scoring", "numeric",
        "--sources.0.max-answer-tokens", "99",
    )  # fmt: skip
    (source,) = config.sources
    assert (source.name, source.environment, source.max_answer_tokens) == ("sums", "task", 99)
    assert source.samples_per_prompt == resolved("rl", RlConfig).sources[0].samples_per_prompt
    task = open_task(TaskConfig(**source.options["task"]))
    problem = task.problem_at(0, split="validation", seed=0)
    assert (problem.prompt, task.score(problem, "it is 4.0")) == ("2 + 2", 1.0)


def test_a_reward_function_scores_the_object_of_the_line(folder):
    (folder / "my_reward.py").write_text(REWARD)
    write_lines(folder / "words.jsonl", *({"prompt": f"word {n}", "letters": n} for n in range(30)))
    options = {"path": "words.jsonl", "reward": "my_reward.py:score"}
    task = open_task(TaskConfig("jsonl", 0, 1000, options=options))
    problem = task.problem_at(0, split="train", seed=0)
    letters = int(problem.prompt.split()[1])
    assert task.score(problem, f"<think>hm</think> {'x' * letters} ") == 1.0
    assert task.score(problem, "x" * (letters + 1)) == 0.25
    assert not task.family.is_instant(task.options)
    before = [file.sha256 for file in task.files]
    (folder / "my_reward.py").write_text(REWARD + "# changed\n")
    assert [file.sha256 for file in task.files] != before


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (None, "my_reward.py:score", "there is no file"),
        ("x = 1", "my_reward.py:score", "has no 'score'; it has x"),
        ("score = 1", "my_reward.py:score", "is a int, not a function"),
        ("def score(:", "my_reward.py:score", r"my_reward.py, line 1"),
        ("import nothing_like_this", "my_reward.py:score", r"my_reward.py, line 1: ModuleNotFoundError"),
        ("raise SystemExit(3)", "my_reward.py:score", "SystemExit"),
        ("x = 1", "my_reward.py", "must be like my_reward.py:score"),
    ],
)
def test_a_reward_that_cannot_be_used_is_named(folder, code, name, message):
    if code is not None:
        (folder / "my_reward.py").write_text(code)
    write_lines(folder / "words.jsonl", {"prompt": "a"})
    with pytest.raises(ConfigError, match=message):
        task = open_task(TaskConfig("jsonl", 0, 1000, options={"path": "words.jsonl", "reward": name}))
        task.problem_at(0, split="train", seed=0)


def test_a_file_that_failed_is_read_again(folder):
    (folder / "broken_then_good.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match="line 1: ZeroDivisionError"):
        load_object("broken_then_good.py:x")
    (folder / "broken_then_good.py").write_text("x = 'a longer line than before'")
    assert load_object("broken_then_good.py:x") == "a longer line than before"


def test_a_recipe_of_one_s_own(folder):
    (folder / "mine.py").write_text(
        "from dataclasses import replace\nfrom recipes.tiny_cpu import sft\n"
        "def short():\n    return replace(sft(), steps=9, warmup_steps=1)\n"
    )
    config = cli._with_overrides("sft", ["mine.py:short", "--seed", "4"], SftConfig)
    assert (config.steps, config.seed) == (9, 4)
    with pytest.raises(ConfigError, match="has no 'long'; it has .*short"):
        cli._with_overrides("sft", ["mine.py:long"], SftConfig)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.mark.parametrize("own", ["reward", "environment"])
def test_a_run_learns_from_the_user_s_code(folder, models, own, monkeypatch):
    (folder / "my_reward.py").write_text(REWARD)
    (folder / "my_env.py").write_text(ENVIRONMENT)
    (folder / "my_words.py").write_text("WORDS = ['a', 'b', 'c']\n")
    write_lines(folder / "words.jsonl", *({"prompt": f"word {n}", "letters": n % 7} for n in range(40)))
    config = grpo_config(models, folder / "run", sources=(source("letters", "rl_runs:LETTERS"),), steps=1)
    config_io.save(config, folder / "start.json")
    arguments = {
        "reward": ["--problems", "words.jsonl", "--reward", "my_reward.py:score"],
        "environment": ["--environment", "my_env.py:PLUGIN", "--environment-options.good", "aeiounrst"],
    }[own]
    monkeypatch.setattr(sys, "argv", ["openmimo", "rl", "--from", "start.json", *arguments])
    cli.main()
    (row,) = [row for row in read_metrics(folder / "run" / "metrics.jsonl") if "learned_samples" in row]
    name = {"reward": "words", "environment": "my_env"}[own]
    assert row["learned_samples"] > 0
    assert any(key.endswith(f"/{name}") for key in row), sorted(row)


def test_the_usage_error_is_of_exit_code_2(data):
    with pytest.raises(UsageError):
        resolved("rl", RlConfig, "--problems", "my.jsonl", "--scoring", "vague")


@pytest.mark.parametrize(
    ("arguments", "warmup"),
    [
        (["--stages.0.steps", "20"], 3),  # 40 of 250
        (["--stages.0.steps=20"], 3),
        (["--stages.0.steps", "40"], 40),
        (["--stages.0.steps", "20", "--stages.0.warmup-steps", "7"], 7),
        (["--stages.1.steps", "20"], 40),
    ],
)
def test_a_short_stage_scales_a_warm_up_that_does_not_fit(arguments, warmup, capsys):
    config = resolved("pretrain", PretrainConfig, *arguments)
    assert config.stages[0].warmup_steps == warmup
    assert ("shortens the warm-up from 40 to 3 steps" in capsys.readouterr().err) == (warmup == 3)
    with pytest.raises(ConfigError, match="warms up for 30"):
        resolved("pretrain", PretrainConfig, "--stages.0.steps", "20", "--stages.0.warmup-steps", "30")
    assert resolved("sft", SftConfig, "--steps", "15").warmup_steps == 1  # 20 of 300
