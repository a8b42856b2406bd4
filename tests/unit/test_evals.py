"""Suites, resumption, servers as models, and scores equal to their definitions on hand-made cases."""

import difflib
import http.server
import json
import math
import sys
import threading
from pathlib import Path

import pytest
from server_thread import running
from tiny_checkpoint import save_tiny_checkpoint

from openmimo import cli
from openmimo.core.errors import ConfigError, DataError, UserError
from openmimo.core.records import Message
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.engine.server.backends.engine import EngineBackend
from openmimo.evals import runner
from openmimo.evals.config import EvalConfig
from openmimo.evals.models import Endpoint
from openmimo.evals.results import Answered, heat_map, summarize
from openmimo.evals.suites import SUITES
from openmimo.evals.task import TASKS, Example, Room
from openmimo.model.embedded import EMBEDDED
from openmimo.model.hf import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def run(monkeypatch, *arguments):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["openmimo", "eval", *map(str, arguments)])
    cli.main()


def with_details(key="", **details):
    return Example(answer=key, max_tokens=1, turns=(Message("user", "?"),), details=details)


@pytest.mark.parametrize(
    ("name", "example", "text", "score"),
    [
        ("niah_multivalue", with_details(references=["12", "34", "56", "Abc"]), "it is 34 and aBC", 0.5),
        ("qa_1", with_details(references=["Owl Bay"]), "In owl bay.", 1.0),
        ("passkey", with_details("71432"), " 71432. 5", 1.0),
        ("passkey", with_details("71432"), "5, then 71432", 0.0),
        ("line_retrieval", with_details("42"), "line 7 has <42>", 1.0),
        ("code_run", with_details("-3"), "it is -3", 1.0),
        ("code_run", with_details("-3"), "-3 or 4", 0.0),
        ("kv_retrieval", with_details("a1-b2"), '"a1-b2",', 1.0),
        ("kv_retrieval", with_details("a1-b2"), "xa1-b2", 0.0),
        ("math_calc", with_details("4, 2, 9, 1"), "[4, 2, 8, 1]", 0.5),
        ("math_calc", with_details("4, 2"), "4 2 7 7 7", 1.0),
        ("gsm_hard", with_details(number=12), "so 3 * 4 = 12. Answer: 12.", 1.0),
        ("gsm_hard", with_details(number=12), "Answer: 7. Answer: 12", 0.0),
        ("gsm_hard", with_details(number=12), r"thus $\boxed{12}$", 1.0),
        ("gsm_symbolic", with_details(variables=["V000001", "V000002"]), "V000002, V000001", 1.0),
        ("gsm_symbolic", with_details(variables=["V000001"]), "V000001, V000002", 0.0),
        ("nolima", with_details(references=["Ada"]), "Canada", 0.0),
        ("nolima", with_details(references=["Ada"]), "it is ada!", 1.0),
        ("longbench2", with_details(answer="B", form="chat"), "The correct answer is (B)", 1.0),
        ("longbench2", with_details(answer="B", form="chat"), "A good question. The correct answer is **B**.", 1.0),
        ("longbench2", with_details(answer="B", form="base"), " (B) because", 1.0),
        ("longbench2", with_details(answer="A", form="base"), " clear", 0.0),
    ],
)  # fmt: skip
def test_scores_of_hand_made_answers(name, example, text, score):
    assert TASKS.get(name).score(example, text) == score


def test_mrcr_is_the_ratio_of_the_standard_library_after_the_prefix():
    drafts = ["Rosa carried a blue lamp.", "Emil painted an old boat by the river."]
    example = with_details(prefix="x7Y", drafts=drafts, number=1)
    task = TASKS.get("mrcr")
    answer = "Emil painted an old coat."
    expected = difflib.SequenceMatcher(None, answer, drafts[1]).ratio()
    assert task.score(example, "x7Y" + answer) == pytest.approx(expected)
    assert task.score(example, answer) == 0.0
    assert task.metrics(example, "x7Y" + answer) == {"has_prefix": 1.0, "right_draft": 1.0}
    assert task.metrics(example, drafts[0]) == {"has_prefix": 0.0, "right_draft": 0.0}


def test_means_weigh_tasks_equally_and_the_effective_length_is_the_last_above_the_threshold():
    def cell(label, length, values):
        return [Answered(label, length, index, value, None, {}, "") for index, value in enumerate(values)]

    examples = [*cell("a", 10, [1.0] * 8), *cell("b", 10, [0.5]), *cell("a", 20, [0.0]), *cell("a", 40, [0.856])]
    results = summarize(reversed(examples), {"both": ("a", "b"), "absent": ("a", "c")})
    assert [(score.length, score.mean) for score in results.scores["both"]] == [(10, 0.75)]
    assert results.scores["both"][0].examples == 9 and "absent" not in results.scores
    assert [score.length for score in results.scores["a"]] == [10, 20, 40]
    assert results.effective_length("a") == 40 and results.effective_length("both") is None


def test_the_heat_map_shows_each_length_and_depth():
    examples = [Answered("a", 64, 0, 1.0, 0.0, {}, ""), Answered("a", 64, 1, 0.0, 0.05, {}, ""),
                Answered("a", 128, 0, 1.0, 1.0, {}, ""), Answered("b", 64, 0, 1.0, 0.5, {}, "")]  # fmt: skip
    figure = heat_map(examples, ["a"])
    means = figure.axes[0].images[0].get_array().filled(math.nan)
    assert means.shape == (10, 2) and means[0, 0] == 0.5 and means[9, 1] == 1.0
    assert math.isnan(means[0, 1]) and math.isnan(means[5, 0])


class KnowsTheKey:
    """A model that answers every example right, and fails before example `fails_at` of those that it is asked."""

    def __init__(self, fails_at=math.inf):
        self.asked = 0
        self.fails_at = fails_at

    def answers(self, room, examples):
        if self.asked + len(examples) > self.fails_at:
            raise UserError("the power is off")
        self.asked += len(examples)
        return [example.answer for example in examples]


def test_a_stopped_suite_goes_on_after_its_last_answer(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "LLM", lambda *arguments, **settings: None)
    run_folder = tmp_path / "run"
    arguments = (
        folder,
        "--suite",
        "tiny",
        "--lengths",
        64,
        128,
        "--examples",
        5,
        "--batch",
        2,
        "--run-folder",
        run_folder,
    )
    first, second = KnowsTheKey(fails_at=21), KnowsTheKey()
    monkeypatch.setattr(runner, "LocalModel", lambda llm: first)
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert "power is off" in " ".join(capsys.readouterr().err.split()) and first.asked == 20
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "label": "nee')  # a kill in the middle of a line
    monkeypatch.setattr(runner, "LocalModel", lambda llm: second)
    run(monkeypatch, *arguments)
    scores = json.loads((run_folder / "scores.json").read_text())
    assert first.asked + second.asked == 4 * 2 * 5
    assert {(score["examples"], score["mean"]) for score in scores["scores"]} == {(5, 1.0), (20, 1.0)}
    assert scores["effective_lengths"] == dict.fromkeys(
        [entry.label for entry in SUITES["tiny"].entries] + ["all"], 128
    )
    assert "<img" in (run_folder / "report.html").read_text()
    assert "100.0" in capsys.readouterr().out
    third = KnowsTheKey()
    monkeypatch.setattr(runner, "write_report", lambda results, title, folder: folder)
    monkeypatch.setattr(runner, "LocalModel", lambda llm: third)
    more = [6 if value == 5 else value for value in arguments]
    run(monkeypatch, *more)
    assert third.asked == 4 * 2  # the sixth example of each task and length
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments, "--seed", 1)
    assert "seed was 0 and is now 1" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "needle", "lengths": (64,), "examples": 3},
        pytest.param({"task": "passkey", "lengths": (400,), "examples": 1}, marks=pytest.mark.slow),
        pytest.param({"task": "passkey", "lengths": (500,), "examples": 1, "form": "chat"}, marks=pytest.mark.slow),
    ],
    ids=["token ids", "text", "chat"],
)
def test_a_server_gives_the_answers_of_its_engine(settings, folder):
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder)
    config = EvalConfig(str(folder), batch=2, **settings)
    cells = runner.plan(config, tokenizer, config.lengths)
    mine = list(runner.answer_all(config, cells, runner.LocalModel(runner.LLM(model, tokenizer))))
    with running(EngineBackend(Engine(model, tokenizer), tokenizer, model_name="tiny")) as server:
        theirs = list(runner.answer_all(config, cells, Endpoint(f"{server.url}/v1/", None)))
    assert [one.text for one in theirs] == [one.text for one in mine]


class Replies(http.server.BaseHTTPRequestHandler):
    """Gives the prepared replies in order."""

    prepared = []

    def do_POST(self):  # noqa: N802 - the name that http.server calls
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert ("messages" in body) == (self.path == "/chat/completions") and body["temperature"] == 0.0
        status, reply = self.prepared.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(503, ""), (200, json.dumps({"choices": [{"text": " fine"}]}))], None),
        ([(400, "too long")], "status 400: too long"),
        ([(200, "<html>")], "does not answer with JSON"),
        ([(200, '{"choices": []}')], "answers without text"),
        ([(200, "[]")], "answers without text"),
        ([(200, json.dumps({"choices": [{"message": {"content": " fine"}}]}))], "chat"),
    ],
)
def test_a_busy_server_is_asked_again_and_other_failures_name_it(replies, message, monkeypatch):
    monkeypatch.setattr("openmimo.evals.models._FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(Replies, "prepared", list(replies))
    with http.server.HTTPServer(("127.0.0.1", 0), Replies) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model = Endpoint(f"http://127.0.0.1:{server.server_port}", "m")
        try:
            room = Room(None, 10, "chat" if message == "chat" else "base")
            if message in (None, "chat"):
                assert model.answers(room, [with_details()]) == [" fine"]
            else:
                with pytest.raises(UserError, match=message):
                    model.answers(room, [with_details()])
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "tiny", "task": "vt"}, "--task has no effect with --suite"),
        ({"suite": "tiny", "text": "a.txt"}, "--text and --suite exclude each other"),
        ({"engine_check": True, "lengths": (64,)}, "--lengths has no effect with --engine-check"),
        ({"length": 128}, "--length has no effect without --engine-check"),
        ({"last_tokens": 8}, "--last-tokens has no effect without --text"),
        ({"model": "m"}, "--model has no effect without --base-url"),
        ({"base_url": "localhost"}, "must begin with http"),
        ({"base_url": "http://x", "path": EMBEDDED}, "--base-url needs PATH"),
        ({"base_url": "http://x", "dtype": "bfloat16"}, "--dtype has no effect with --base-url"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**{"path": "model", **settings})


def test_lengths_that_are_too_short_are_refused_for_a_task_and_left_out_of_a_suite(folder):
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(DataError, match="at least .* tokens"):
        runner.plan(EvalConfig("m", task="vt"), tokenizer, (64,))
    cells = runner.plan(EvalConfig("m", suite="tiny"), tokenizer, (16, 64))
    assert {cell.entry.label for cell in cells if cell.room.length == 16} == {"needle", "token_multikey"}
    with pytest.raises(ConfigError, match="None of the tasks"):
        runner.plan(EvalConfig("m", suite="ruler"), tokenizer, (8,))


def test_every_suite_names_tasks_with_valid_options():
    for suite in SUITES.values():
        labels = [entry.label for entry in suite.entries]
        assert len(set(labels)) == len(labels) and all(set(part) <= set(labels) for part in suite.means.values())
        for entry in suite.entries:
            TASKS.get(entry.task).options(**entry.options)
    assert len(SUITES["ruler"].entries) == 13


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "data.json"), ("{", "JSON"), ("[]", "no questions"), ('[{"question": "?"}]', "entry 0")],
)
def test_a_wrong_longbench_file_is_named(text, message, tmp_path):
    file = tmp_path / f"{abs(hash(text))}.json"
    if text is not None:
        Path(file).write_text(text)
    task = TASKS.get("longbench2")
    with pytest.raises(UserError, match=message if text is None else str(file)):
        task.num_examples(task.options(file="" if text is None else str(file)))
