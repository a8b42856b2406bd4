"""Wrong values on the command line and in `--from` files give one paragraph and exit code 1 or 2, and write nothing.

Hypothesis draws words and files. The fast tests run `cli.main` in this process; the slow ones start commands.
"""

import functools
import json
import os
import resource
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmimo import cli
from openmimo.core import config as config_io

ROOT = Path(__file__).parents[2]
TRAINERS = ("pretrain", "extend", "sft", "rl", "mopd", "compare", "demo")
SECONDS = 120  # seconds, far above what a refusal takes
BYTES = 6 << 30  # address space of a command
WORDS = ("", " ", "-1", "0", "nan", "inf", "-inf", "1e309", "1e30", "9" * 400, "1.5", "true", "None", "x", "a\nb",
         "/nope", "/dev/null", "/proc/self/mem", "..", "[]", "{}", "\ud800", "\udcff", "\x1b[31m", "é" * 300, "--", "-",
         "--nope", "a" * 5000)  # fmt: skip
VALUES = (None, True, -1, 0, 2**70, 10**400, 1.5, float("nan"), float("inf"), 1e308, "", "x", "a\nb", "\ud800", [], [1],
          {}, {"x": 1}, [[]], "false")  # fmt: skip
# For each verb, its first words and an option that refuses every value of WORDS.
REFUSING = {
    "generate": (("/nope",), ("--max-tokens", "--temperature", "--top-p", "--device", "--dtype", "--seed", "--nope")),
    "chat": (("/nope",), ("--max-tokens", "--top-k", "--min-p", "--device", "--dtype", "--logit-bias")),
    "serve": (("/nope",), ("--port", "--host", "--threads", "--max-queue", "--device", "--dtype", "--max-tokens")),
    "eval": (("/nope",), ("--lengths", "--examples", "--seed", "--batch", "--task", "--dtype", "--output")),
    "convert": (("/nope", "NEW"), ("--dtype", "--projections", "--window-keys", "--quantize", "--stages", "--scales")),
    "merge": (("/nope", "NEW"), ("--children", "--method", "--scale")),
    "audit": ((), ("--model", "--quantized", "nope")),
    "bench": ((), ("--only", "--threads", "--nope")),
}
PATHS = {"pretrain": "run_folder", "extend": "run_folder", "sft": "run_folder", "rl": "run_folder",
         "mopd": "run_folder", "compare": "output", "demo": "folder"}  # fmt: skip
MISSING = {"pretrain": "--init-from", "extend": "--checkpoint", "sft": "--checkpoint", "rl": "--checkpoint",
           "mopd": "--checkpoint"}  # fmt: skip
SETTING = dict(deadline=None, suppress_health_check=list(HealthCheck))


def run_here(arguments: list[str], capsys) -> tuple[int, str]:
    """Runs a command in this process. Returns exit code and standard error; 99 and the trace if it raised."""
    before, sys.argv = sys.argv, ["openmimo", *arguments]
    capsys.readouterr()
    code, trace = 0, ""
    try:
        cli.main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except Exception:
        code, trace = 99, traceback.format_exc()
    finally:
        sys.argv = before
    return code, capsys.readouterr().err + trace


def run_there(arguments: list[str], capsys=None) -> tuple[int, str]:
    """Runs a command in a process of its own, with limits on time and memory."""
    done = subprocess.run(
        [sys.executable, "-m", "openmimo", *(os.fsencode(word) if _bytes(word) else word for word in arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES)),
    )  # fmt: skip
    return done.returncode, done.stderr.decode("utf-8", "replace")


def _bytes(word: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in word)


def assert_refused(arguments: list[str], code: int, err: str, folder: Path, before: set[Path]) -> None:
    assert "Traceback" not in err, f"{arguments!r}\n{err}"
    assert code in (1, 2), f"{arguments!r}: {code} {err}"
    assert err.startswith("error: "), f"{arguments!r}: {err!r}"
    assert err.strip().count("\n") == 0, f"{arguments!r}: {err!r}"
    assert len(err) < 2500, arguments
    assert all(character.isprintable() for character in err.strip()), repr(err)
    assert set(folder.rglob("*")) == before, f"{arguments!r} wrote something"


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    """Draws a verb, a path that does not exist if the verb needs one, and one to three options with odd values."""
    verb = draw(st.sampled_from(sorted(REFUSING)))
    first, options = REFUSING[verb]
    words = st.one_of(st.sampled_from(WORDS), st.text(max_size=8).map(lambda text: text.replace("\0", "")))
    rest = [word for option in draw(st.lists(st.sampled_from(options), min_size=1, max_size=3))
            for word in (option, draw(words))]  # fmt: skip
    return [verb, *first, *rest]


@st.composite
def config_files(draw: st.DrawFn) -> tuple[str, bytes | None]:
    """Draws a verb and the bytes of a file for its `--from`: the recipe's config with one changed value, or invalid
    JSON.
    """
    verb = draw(st.sampled_from(TRAINERS))
    if draw(st.integers(0, 9)) == 0:
        return verb, draw(
            st.sampled_from((b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'"x"', b"1e999", None))
        )
    values = config_io.to_dict(cli.load_recipe("tiny_cpu", verb))
    values[PATHS[verb]] = "RUN"
    node = values
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], (dict, list)) or not node[key] or draw(st.integers(0, 3)) == 0:
            break
        node = node[key]
    change = draw(st.sampled_from(("value", "value", "value", "unknown", "remove")))
    if change == "value" or isinstance(node, list):
        node[key] = draw(st.sampled_from(VALUES))
    elif change == "unknown":
        node[f"{key}_x"] = 1
    else:
        del node[key]
    return verb, json.dumps(values).encode()


@functools.cache
def training_options(verb: str) -> list[str]:
    """Returns the options of a verb's recipe that take one word, as the command line names them."""

    def leaves(value, name):
        if isinstance(value, dict):
            return [leaf for key, inner in value.items() for leaf in leaves(inner, [*name, key])]
        if isinstance(value, list):
            return [leaf for key, inner in enumerate(value) for leaf in leaves(inner, [*name, str(key)])]
        return ["--" + ".".join(name).replace("_", "-")]

    held = config_io.to_dict(cli.load_recipe("tiny_cpu", verb))
    return [option for option in leaves(held, []) if option not in (MISSING[verb], "--run-folder")]


@st.composite
def training_commands(draw: st.DrawFn) -> list[str]:
    """Draws a verb that trains, a checkpoint that does not exist, and one option with an odd value."""
    verb = draw(st.sampled_from(sorted(MISSING)))
    option = draw(st.sampled_from(training_options(verb)))
    return [verb, "tiny_cpu", "--run-folder", "NEW", MISSING[verb], "/nope", option, draw(st.sampled_from(WORDS))]


def check_command(arguments: list[str], folder: Path, run, capsys) -> None:
    given = [str(folder / "new") if word == "NEW" else word for word in arguments]
    before = set(folder.rglob("*"))
    code, err = run(given, capsys)
    if code == 0 and given[0] in ("audit", "bench"):
        return
    assert_refused(given, code, err, folder, before)


def check_file(verb: str, content: bytes | None, folder: Path, run, capsys) -> None:
    """Checks that a config file is accepted or refused. An unknown option after it keeps a run from starting."""
    path = folder / "odd.json"
    path.unlink(missing_ok=True)
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content.replace(b'"RUN"', json.dumps(str(folder / "run")).encode()))
    arguments = [verb, "--from", str(path), "--no-such-option"]
    code, err = run(arguments, capsys)
    assert_refused(arguments, code, err, folder, {path})
    assert str(path) in err or "--no-such-option" in err


@settings(max_examples=25, **SETTING)
@given(arguments=commands().filter(lambda given: given[0] not in ("bench", "audit")))
def test_odd_values_of_options_are_refused_in_a_paragraph(arguments, tmp_path_factory, capsys):
    check_command(arguments, tmp_path_factory.mktemp("words"), run_here, capsys)


@settings(max_examples=30, **SETTING)
@given(arguments=training_commands())
def test_odd_settings_of_a_training_run_are_refused_before_anything_is_written(arguments, tmp_path_factory, capsys):
    check_command(arguments, tmp_path_factory.mktemp("settings"), run_here, capsys)


@pytest.mark.slow
@settings(max_examples=400, **SETTING)
@given(arguments=training_commands())
def test_many_odd_settings_of_training_runs(arguments, tmp_path_factory, capsys):
    check_command(arguments, tmp_path_factory.mktemp("settings"), run_here, capsys)


@settings(max_examples=10, **SETTING)
@given(drawn=config_files())
def test_odd_config_files_are_refused_in_a_paragraph(drawn, tmp_path_factory, capsys):
    check_file(*drawn, tmp_path_factory.mktemp("files"), run_here, capsys)


@pytest.mark.slow
@settings(max_examples=400, **SETTING)
@given(arguments=commands())
def test_many_odd_values_of_options(arguments, tmp_path_factory, capsys):
    if arguments[0] not in ("bench", "audit"):
        check_command(arguments, tmp_path_factory.mktemp("words"), run_here, capsys)


@pytest.mark.slow
@settings(max_examples=400, **SETTING)
@given(drawn=config_files())
def test_many_odd_config_files(drawn, tmp_path_factory, capsys):
    check_file(*drawn, tmp_path_factory.mktemp("files"), run_here, capsys)


@pytest.mark.slow
@settings(max_examples=60, **SETTING)
@given(arguments=commands().filter(lambda given: not any("\ud800" <= c <= "\udb7f" for w in given for c in w)))
def test_odd_values_in_commands_of_their_own(arguments, tmp_path_factory):
    if arguments[0] not in ("bench", "audit"):
        check_command(arguments, tmp_path_factory.mktemp("words"), run_there, None)


SYNTAX = [
    (["convert"], "SOURCE"), (["convert", "a"], "DESTINATION"),
    (["merge", "a", "b"], "--children"), (["pretrain", "tiny_cpu", "--nope", "3"], "--nope"),
    (["pretrain", "tiny_cpu", "extra"], "extra"), (["pretrain", "tiny_cpu", "--threads", "x"], "--threads"),
    (["pretrain", "tiny_cpu", "--run-folder"], "--run-folder"),
    (["pretrain", "tiny_cpu", "--from", "x"], "--from FILE"),
    (["pretrain", "--from"], "--from"), (["pretrain", "--from="], "--from"), (["generate", "\udcff"], "UTF-8"),
    (["serve", "--stub", "--port", "x"], "--port"), (["bench", "--nope"], "--nope"),
    (["bench", "--threads", "-1"], "--threads"), (["generate", "/x", "--dtype", "int3"], "--dtype"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"), SYNTAX, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_syntax_ends_with_code_2_and_names_the_option(arguments, named, tmp_path, capsys):
    code, err = run_here(arguments, capsys)
    assert code == 2
    assert named in err
    assert_refused(arguments, code, err, tmp_path, set())


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "empty name", "latin-1"])
@pytest.mark.parametrize("verb", TRAINERS)
def test_a_file_that_is_no_config_is_named(verb, kind, tmp_path, capsys):
    path = tmp_path / "odd.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "latin-1":
        path.write_bytes(b'{"run_folder": "\xe9"}')
    before = set(tmp_path.rglob("*"))
    code, err = run_here([verb, "--from", "" if kind == "empty name" else str(path)], capsys)
    assert_refused([verb, kind], code, err, tmp_path, before)
    assert "--from" in err if kind == "empty name" else str(path) in err


def test_a_recipe_of_another_verb_is_named(capsys, tmp_path):
    code, err = run_here(["pretrain", "tiny_cpu:sft"], capsys)
    assert_refused(["pretrain", "tiny_cpu:sft"], code, err, tmp_path, set())
    assert code == 1 and "tiny_cpu:sft" in err and "SftConfig" in err


@pytest.mark.parametrize("kind", ["file", "below a file", "empty"])
def test_a_run_folder_that_cannot_be_one_is_refused(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    before = set(tmp_path.rglob("*"))
    folder = {"file": str(tmp_path / "file"), "below a file": str(tmp_path / "file" / "x"), "empty": ""}[kind]
    code, err = run_here(["pretrain", "tiny_cpu", "--run-folder", folder], capsys)
    assert_refused([kind], code, err, tmp_path, before)
    assert "file" in err or "run_folder" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_used_port_is_named_before_a_model_is_loaded(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, err = run_here(["serve", "/nope", "--port", port], capsys)
    assert_refused(["serve"], code, err, tmp_path, set())
    assert code == 1 and f"--port {port}" in err


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_command_quietly():
    command = subprocess.Popen(
        [sys.executable, "-m", "openmimo", "audit", "tiny"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    command.stdout.close()
    assert command.stderr.read() == b""
    assert command.wait(SECONDS) == 1


@pytest.mark.slow
def test_the_benchmarks_start_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from openmimo.cli import main; main()", "bench", "--help"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
