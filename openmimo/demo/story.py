"""`openmimo demo`: trains a model on real text, extends its context, post-trains it, measures it, and writes a report.

The result of each part is a file in the demo's folder. A part with a result is skipped. An interrupted training part
resumes from its newest checkpoint.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openmimo.core import config as config_io
from openmimo.core.config import run_folder
from openmimo.core.errors import ConfigError
from openmimo.demo.config import DemoConfig
from openmimo.demo.measure import measure_answers, measure_decoding, measure_retrieval
from openmimo.demo.page import Findings, write_page
from openmimo.demo.parts import Parts
from openmimo.demo.teachers import run_teachers
from openmimo.rl.compare import compare
from openmimo.rl.run import train
from openmimo.train.config import check_path
from openmimo.train.pretrain import extend, pretrain, sft

REFERENCE_MACHINE = "2 cores of an AMD EPYC (family 25), shared with other work, 2026-11-28"
REFERENCE_SECONDS = {
    "pretrain": 431, "extend": 114, "retrieval_before": 17, "retrieval_after": 19, "decoding": 5, "sft": 175,
    "teachers": 245, "mopd": 83, "seesaw": 18, "answers": 1,
}  # fmt: skip


def run(config: DemoConfig) -> Path:
    """Runs the parts of the demo that have no result yet, and returns the path of the report.

    Raises:
        ConfigError: The folder cannot be used, or contains a demo with other settings.
    """
    console = Console()
    if config.pretrain.threads:
        torch.set_num_threads(config.pretrain.threads)
    folder = Path(config.folder)
    check_path(config.folder, "folder")
    _check_config(config, folder)
    with run_folder(folder):
        config_io.save(config, folder / "config.json")
        return _tell(config, folder, console)


def _tell(config: DemoConfig, folder: Path, console: Console) -> Path:
    parts = Parts(folder, console, REFERENCE_SECONDS, REFERENCE_MACHINE)
    parts.print_time()
    checkpoint, model_folder = config.extend.checkpoint, Path(config.extend.run_folder) / "model"
    parts.run(
        "pretrain",
        "1/8  pre-training: a tokenizer, and a model from random weights",
        lambda: _done(pretrain(config.pretrain)),
    )
    parts.run("extend", "2/8  context extension, with three MTP heads", lambda: _done(extend(config.extend)))
    before = parts.run(
        "retrieval_before", "3/8  retrieval before the extension", lambda: measure_retrieval(config, checkpoint)
    )
    after = parts.run(
        "retrieval_after", "     retrieval after the extension", lambda: measure_retrieval(config, str(model_folder))
    )
    decoding = parts.run(
        "decoding", "4/8  decoding, plain and speculative", lambda: measure_decoding(config, model_folder)
    )
    parts.run("sft", "5/8  fine-tuning on demonstrations", lambda: _done(sft(config.sft)))
    parts.run(
        "teachers", "6/8  reinforcement learning: a teacher for each domain", lambda: run_teachers(config.teachers)
    )
    parts.run("mopd", "7/8  distillation: one student of all teachers", lambda: _done(train(config.mopd)))
    seesaw = parts.run("seesaw", "8/8  evaluation of all models in all domains", lambda: _seesaw(config))
    answers = parts.run("answers", "     drafts before and after distillation", lambda: measure_answers(config))

    findings = Findings(before["scores"], after["scores"], decoding, seesaw, answers, parts.seconds())
    report = write_page(folder, config, findings)
    _say_what_came_of_it(console, findings, report, model_folder, Path(config.mopd.run_folder) / "model")
    return report


def _check_config(config: DemoConfig, folder: Path) -> None:
    """Raises ConfigError if the folder contains results of another config."""
    path = folder / "config.json"
    if path.exists() and config_io.load(DemoConfig, path) != config:
        raise ConfigError(f"{folder} contains a demo with other settings; name another --folder, or remove it.")


def _done(model_folder: Path) -> dict[str, Any]:
    return {"model": str(model_folder)}


def _seesaw(config: DemoConfig) -> dict[str, Any]:
    return {name: {domain: vars(cell) for domain, cell in row.items()} for name, row in compare(config.compare).items()}


def _say_what_came_of_it(
    console: Console, findings: Findings, report: Path, model_folder: Path, student_folder: Path
) -> None:
    def shown(scores: list[dict[str, Any]]) -> str:
        return "  ".join(f"{score['length']}: {score['mean']:.0%}" for score in scores)

    decoding = findings.decoding
    speculative, plain = decoding["speculative"], decoding["plain"]
    agreement = "the same text" if decoding["same_text"] else "texts differ where two tokens were equally likely"
    console.print()
    console.print(f"retrieval before  {shown(findings.before)}", highlight=False, soft_wrap=True)
    console.print(f"retrieval after   {shown(findings.after)}", highlight=False, soft_wrap=True)
    console.print(
        f"decoding          {plain['tokens_per_second']:.0f} tokens/s plain, "
        f"{speculative['tokens_per_second']:.0f} with MTP drafts "
        f"({speculative['accepted_tokens_per_step']:.2f} tokens per step; {agreement})",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"cache             {decoding['cache_bytes'] / 1024:.0f} KiB at {decoding['cache_positions']} positions; "
        f"{decoding['all_global_cache_bytes'] / 1024:.0f} KiB if every layer were global",
        highlight=False,
        soft_wrap=True,
    )
    _say_who_can_what(console, findings)
    console.print(f"report            {report}", soft_wrap=True)
    console.print(f"model             {model_folder}   (also loads in transformers)", soft_wrap=True)
    console.print(f"student           {student_folder}", soft_wrap=True)
    for title, command in _commands(model_folder, student_folder).items():
        print(f"{title:<17} {command}")  # not styled, so that it can be copied


def _commands(model_folder: Path, student_folder: Path) -> dict[str, str]:
    """Commands that try the models, and run in the present working folder as they are printed."""
    openmimo = program()
    generate = [*openmimo, "generate", "--temperature", "0"]
    return {
        "talk to it": shlex.join([*generate, str(model_folder), "--prompt", "def main("]),
        "ask the student": shlex.join([*generate, str(student_folder), "--chat", "--prompt", "sort 31524"]),
        "serve it": shlex.join([*openmimo, "serve", str(student_folder)])
        + "   # API and chat page at http://127.0.0.1:8000",
    }


def program() -> list[str]:
    """The words that start this program: its installed script, or Python with -m; short if it lies below here."""
    python = Path(sys.executable)
    script = python.with_name("openmimo")
    path = script if os.access(script, os.X_OK) else python
    shown = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    if "/" not in shown:
        shown = f"./{shown}"  # a shell searches for a bare name elsewhere
    return [shown] if path == script else [shown, "-m", "openmimo"]


def _say_who_can_what(console: Console, findings: Findings) -> None:
    for name, row in findings.seesaw.items():
        shown = "  ".join(f"{domain}: {cell['mean']:.0%}" for domain, cell in row.items())
        console.print(f"{name:<17} {shown}", highlight=False, soft_wrap=True)
    before, after = (findings.answers[name]["accepted_tokens_per_step"] for name in ("sft", "student"))
    console.print(
        f"drafts on answers {before:.2f} tokens per step before distillation, {after:.2f} after", highlight=False
    )
