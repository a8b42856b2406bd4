"""What the demo prints: the time of each part on the reference machine, and commands that run as they stand."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from openmimo.demo import story
from openmimo.demo.parts import Parts


@pytest.mark.parametrize(
    "working_folder", [pytest.param("/", marks=pytest.mark.slow), pytest.param("HERE", marks=pytest.mark.slow), "BIN"]
)
def test_the_printed_program_starts_from_any_folder(working_folder, tmp_path, monkeypatch):
    folder = {"HERE": tmp_path, "BIN": Path(sys.executable).parent}.get(working_folder, Path(working_folder))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(story.__file__).parents[2]))
    commands = story._commands(Path("runs/a model"), Path("runs/student"))
    assert "'runs/a model'" in commands["talk to it"]
    for command in commands.values():
        ended = subprocess.run(command.replace("generate", "generate --help").replace("serve", "serve --help"),
                               shell=True, capture_output=True, text=True)  # fmt: skip
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "usage: openmimo" in ended.stdout


def test_a_program_without_an_installed_script_is_python_with_m(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert story.program() == [str(tmp_path / "bin" / "python"), "-m", "openmimo"]
    monkeypatch.chdir(tmp_path)
    assert story.program() == ["bin/python", "-m", "openmimo"]
    (tmp_path / "bin" / "openmimo").touch(mode=0o755)
    assert story.program() == ["bin/openmimo"]


def test_every_part_has_a_time_that_is_shown_before_it_runs(tmp_path, capsys):
    parts = re.findall(r'parts\.run\(\s*"(\w+)"', inspect.getsource(story._tell))
    assert parts == list(story.REFERENCE_SECONDS)
    run = Parts(tmp_path, Console(width=200), story.REFERENCE_SECONDS, story.REFERENCE_MACHINE)
    run.print_time()
    assert "18 minutes in all" in capsys.readouterr().out
    run.run("sft", "fine-tuning", lambda: {"shown": capsys.readouterr().out})
    assert run.run("sft", "fine-tuning", dict)["shown"] == "fine-tuning  (3 minutes on the reference machine)\n"
    assert "there" not in capsys.readouterr().out
    run.print_time()
    assert "16 minutes in all" in capsys.readouterr().out
