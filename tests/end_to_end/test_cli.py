"""The command line: help lists every option, and mistakes give one paragraph and exit code 1."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_model

import openmimo
from openmimo import audio_commands, cli
from openmimo.core.errors import Interrupted
from openmimo.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Runs a command in this process. Returns its exit code, standard output and standard error."""
    before, sys.argv = sys.argv, ["openmimo", *arguments]
    try:
        cli.main()
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    model = tiny_model(mtp_heads=2)
    openmimo.save_model(model, folder)
    return folder


@pytest.fixture
def speaking(tmp_path):
    """A checkpoint with a tokenizer."""
    from conftest import randomize, tiny_config

    from openmimo.model.mimo import MiMo

    folder = tmp_path / "speaking"
    model = randomize(MiMo(replace(tiny_config(mtp_heads=2), vocab_size=300)), 0)
    openmimo.save_model(model, folder)
    Tokenizer.train(["some words and some more words"] * 30, 300).save(folder)
    return folder


def test_help_needs_no_torch_and_names_every_verb():
    code = "import sys, openmimo.cli as c; sys.argv = ['openmimo', '--help']\ntry: c.main()\nexcept SystemExit: pass\n"
    out = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert all(re.search(rf"^  {verb} ", out, flags=re.MULTILINE) for verb in cli.VERBS)
    assert "tiny_cpu" in out


AUDIO = [f"audio {command}" for command in audio_commands.COMMANDS]
DEMOS = ("demo", "chain", "audio demo")  # have the options of all training commands


@pytest.mark.parametrize("verb", [*(verb for verb in cli.VERBS if verb not in ("bench", "audio")), *AUDIO])
def test_every_option_has_a_default_and_a_line(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # wider, and tyro writes two columns
    code, out, _ = run(capsys, *verb.split(), "--help-all")
    assert code == 0
    options = re.split(r"\n\W*(?=--[a-z])", out)[1:]
    assert options
    for option in options:
        words = re.sub(r"[│╭╮╰╯─|+\s-]+ ", " ", option)
        name, _, rest = words.partition(" ")
        if re.search(r"\.options\.|^--(teachers|models|mopd.teachers|compare.(teachers|models))\.", name):
            continue  # keys of the recipe's mappings
        described = re.sub(r"\(default:.*|\(required\).*", "", rest)
        assert len(re.findall(r"[a-z]{2,}", described)) >= 2, f"{verb} {name} has no line of help: {words!r}"


@pytest.mark.parametrize(
    "verb", [*(verb for verb in cli.VERBS if verb not in ("bench", "merge", "convert", "audit", "audio")), *AUDIO]
)
def test_the_short_help_fits_two_screens_and_names_every_option(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, short, _ = run(capsys, *verb.split(), "--help")
    assert code == 0
    assert max(map(len, short.splitlines())) <= 80
    assert len(short.splitlines()) <= 90
    assert "--help-all" in short or verb.startswith("audio")  # those of few options explain all of them
    if verb not in DEMOS:
        _, long, _ = run(capsys, *verb.split(), "--help-all")
        options = re.findall(r"^\W*--([a-z0-9.-]+)", long, flags=re.MULTILINE)
        names = {name.rpartition(".")[2] for name in options if ".options." not in name}
        missing = {name for name in names if not re.search(rf"[ -]{name}\b", short)}
        assert not missing - set(MAPPINGS)
        assert "logprobs" not in long


MAPPINGS = ("sorting", "unique", "reverse", "lookup", "student")  # keys that the recipe's teachers and models have


def test_version_and_the_ways_to_start_are_told(capsys):
    assert run(capsys, "--version")[:2] == (0, f"openmimo {openmimo.__version__}\n")
    for verb, options in {"pretrain": ["--data"], "sft": ["--data"], "rl": ["--problems", "--reward"]}.items():
        _, short, _ = run(capsys, verb, "--help")
        assert "--from FILE" in short
        assert all(re.search(rf"^  {option} ", short, flags=re.MULTILINE) for option in options)
    assert "--from" in run(capsys, "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["frobnicate"], "frobnicate"),
        (["pretrain", "tiny_gpu"], "tiny_gpu"),
        (["pretrain", "--from", "nowhere.json"], "nowhere.json"),
        (["pretrain", "tiny_cpu", "--model", "huge", "--run-folder", "RUN"], "huge"),
        (["pretrain", "tiny_cpu", "--dtype", "float8", "--run-folder", "RUN"], "float8"),
        (["pretrain", "tiny_cpu", "--stages.0.warmup-steps", "9999", "--run-folder", "RUN"], "warms up"),
        (["extend", "tiny_cpu", "--checkpoint", "nowhere", "--run-folder", "RUN"], "nowhere"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["generate", "CHECKPOINT", "--prompt", "x"], "tokenizer.json"),
        (["generate", "CHECKPOINT", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["eval", "CHECKPOINT"], "tokenizer.json"),
        (["convert", "CHECKPOINT", "CHECKPOINT"], "already exists"),
        (["convert", "CHECKPOINT", "RUN", "--dtype", "int3"], "int3"),
        (["convert", "nowhere", "RUN"], "nowhere"),
        (["audit", "enormous"], "enormous"),
        (["pretrain", "tiny_cpu", "--threads", "100000", "--run-folder", "RUN"], "threads"),
        (["pretrain", "tiny_cpu", "--run-folder", ""], "run_folder"),
        (["pretrain", "tiny_cpu", "--init-from", "CHECKPOINT", "--model", "deep", "--run-folder", "RUN"], "deep"),
        (["pretrain", "flash_309b", "--run-folder", "RUN"], "corpus/general"),
        (["rl", "tiny_cpu", "--algorithm", "nope", "--run-folder", "RUN"], "nope"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_1(arguments, named, checkpoint, tmp_path, capsys):
    given = [{"CHECKPOINT": str(checkpoint), "RUN": str(tmp_path / "new")}.get(word, word) for word in arguments]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *given)
    assert code == 1
    assert named in err
    assert "Traceback" not in err
    assert err.strip().count("\n\n") == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_corrupt_weights_stop_a_conversion_before_it_writes(checkpoint, tmp_path, capsys):
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[: len(data) // 3])
    code, _, err = run(capsys, "convert", str(checkpoint), str(tmp_path / "new"))
    assert code == 1
    assert "model.safetensors" in err
    assert not (tmp_path / "new").exists()


def test_convert_audit_and_back(checkpoint, tmp_path, capsys):
    code, out, _ = run(capsys, "convert", str(checkpoint), str(tmp_path / "bf16"), "--dtype", "bfloat16")
    assert (code, json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"]) == (0, "bfloat16")
    code, out, _ = run(capsys, "audit", str(checkpoint), "--tensors")
    assert code == 0
    assert "model.mtp.layers.1.eh_proj.weight\t[64, 128]" in out


def test_generate_holds_weights_in_another_format(speaking, capsys):
    sampling = ["--max-tokens", "24", "--temperature", "0"]
    code, out, _ = run(capsys, "generate", str(speaking), "--prompt", "some words", *sampling, "--weights", "int8")
    params = openmimo.SamplingParams(max_tokens=24, temperature=0.0)
    texts = {
        weights: openmimo.LLM(speaking, weights=weights).generate(["some words"], params)[0].text
        for weights in ("plain", "int8")
    }
    assert code == 0 and out.strip() == texts["int8"].strip() != texts["plain"].strip()


def test_generate_speaks_and_reports(speaking, capsys):
    sampling = ["--max-tokens", "12", "--temperature", "0", "--ignore-eos"]
    code, out, err = run(capsys, "generate", str(speaking), "--prompt", "some words", *sampling)
    assert code == 0
    assert "12 tokens" in err
    assert "drafts accepted" in err
    code, plain, _ = run(
        capsys, "generate", str(speaking), "--prompt", "some words", *sampling, "--speculative", "False"
    )
    assert plain == out


def test_chat_takes_turns_until_quit(speaking, capsys, monkeypatch):
    said = iter(["hi", "/reset", "more", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    code, _, err = run(capsys, "chat", str(speaking), "--max-tokens", "5", "--seed", "1")
    assert code == 0
    assert err.count("tokens/s") == 2


def test_eval_writes_scores(speaking, tmp_path, capsys):
    output = tmp_path / "scores.json"
    arguments = ["--lengths", "64", "128", "--examples", "3", "--output", str(output)]
    code, out, _ = run(capsys, "eval", str(speaking), *arguments)
    assert code == 0
    assert [score["length"] for score in json.loads(output.read_text())["scores"]] == [64, 128]


@pytest.mark.parametrize(
    ("verb", "said"), [("generate", "the text so far"), ("convert", "old one is unchanged"), ("eval", "scores")]
)
@pytest.mark.parametrize(
    ("interrupt", "code"),
    [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 143), (Interrupted(signal.SIGINT), 130)],
)
def test_a_verb_that_a_signal_ends_says_what_is_kept(verb, said, interrupt, code, capsys, monkeypatch):
    def end(arguments):
        raise interrupt

    monkeypatch.setitem(cli.VERBS, verb, replace(cli.VERBS[verb], run=end))
    found, out, err = run(capsys, verb)
    assert found == code
    assert said in err
    assert "checkpoint" not in err or verb == "convert"
    assert err.strip().count("\n") == 0


@pytest.mark.slow
def test_sigterm_ends_a_verb_with_a_paragraph(speaking):
    command = [sys.executable, "-m", "openmimo", "chat", str(speaking)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    process.stderr.readline()  # the line that chat prints when it is ready
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "ended by SIGTERM: the conversation is not kept." in err
    assert "Traceback" not in err


def test_an_os_error_names_its_file(capsys, monkeypatch):
    def full(arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/metrics.jsonl")

    monkeypatch.setitem(cli.VERBS, "pretrain", replace(cli.VERBS["pretrain"], run=full))
    code, _, err = run(capsys, "pretrain")
    assert code == 1
    assert err.startswith("error: runs/x/metrics.jsonl: No space left on device. Make room")
