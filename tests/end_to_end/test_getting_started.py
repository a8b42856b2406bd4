"""Every command and file of the getting-started pages, in a fresh folder, with fewer steps."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from openmimo import cli

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("own_text", "own_chats", "own_problems", "evaluate")
STAGES = (f"--stages.{stage}.steps 1" for stage in range(4))
FEW = {
    "pretrain": f"--stages.0.warmup-steps 0 {' '.join(STAGES)}",
    "extend": "--steps 1",
    "sft": "--steps 2 --warmup-steps 0",
    "rl": "--steps 1 --warmup-steps 0 --groups-per-step 4 --evaluation.problems 2",
    "eval": "",
    "generate": "--max-tokens 4",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of every `openmimo` command of a page, but for chat, which waits for a person."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words[1:] for words in map(shlex.split, filter(None, lines)) if words[1] != "chat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data that the pages name and the code that they show."""
    folder = tmp_path_factory.mktemp("fresh")
    words = "".join(f"line {number} of a text about {number * 7 % 50} things\n" for number in range(3000))
    for name in ("my.txt", "other.txt"):
        (folder / name).write_text(words)
    for page in PAGES:
        for code in blocks(page, "python"):
            (folder / code.split()[1]).write_text(code)
    (chat,), (problem,) = ([json.loads(text) for text in blocks(page, "json")] for page in PAGES[1:3])
    numbers = range(60)
    chats = [[{**turn, "content": f"{turn['content']} {n}"} for turn in chat["messages"]] for n in numbers]
    write_lines(folder / "chats.jsonl", *({"messages": turns} for turns in chats))
    write_lines(folder / "problems.jsonl", *({**problem, "prompt": f"What follows {n}?", "answer": n} for n in numbers))
    write_lines(folder / "words.jsonl", *({"prompt": f"Write {n}", "letters": n % 9} for n in range(60)))
    return folder


def write_lines(path: Path, *lines: dict) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
def test_every_command_of_the_pages_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    tried = []
    for page in PAGES:
        for words in commands(page):
            few = FEW[words[0]] if not words[1].startswith("my_recipe.py") else "--stages.0.steps 2"
            monkeypatch.setattr(sys, "argv", ["openmimo", *words, *few.split()])
            cli.main()
            tried.append(words[0])
    assert set(tried) == set(FEW)
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    made = {path.parent.name for path in folder.glob("runs/*/model")}
    assert made == {"mine", "try", "mine_longer", "more", "my_recipe", "mine_sft", "mine_rl", "words", "guess"}
    torch.set_num_threads(threads)


def test_the_pages_are_linked_from_the_readme():
    readme = (DOCS.parent / "README.md").read_text()
    assert all(f"(docs/{page}.md)" in readme for page in (*PAGES, "serve_yours"))
