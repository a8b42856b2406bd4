"""Compares MOPD with baselines over seeds, in the domains of three teachers and in one domain without a teacher.

    python -m benchmarks.seesaw --base runs/demo/sft/model [--seeds 3] [--folder runs/seesaw] [--few-prompts 32]

Trains a teacher for each domain from the base, then a student for each method and seed, and writes the see-saw report.
Each run is a process of `openmimo rl` or `openmimo mopd`, in parallel up to the number of cores. Finished runs are kept
and interrupted runs resume. All students take the same number of optimizer steps. CPU seconds are reported.

Methods:

    mopd                           equations 7 to 9
    mopd_full, mopd_top_k          reverse KL over the whole vocabulary, or over the top k tokens with a correction
    soft_kd                        forward KL on answers of the teachers
    sft_on_teachers                cross-entropy on answers of the teachers
    rejection                      the same, on correct answers only
    mixed_rl, sequential_rl        reinforcement learning on all domains at once, or on one after the other
    average, task_arithmetic       merges of the teachers' weights

Predictions, from measurements of others at a tenth of the size: mopd_full and mopd_top_k recover over nine tenths of
the teachers' lead, mopd somewhat less. With unlimited prompts, soft_kd and sft_on_teachers recover as much. Averaging
loses most of the lead. Methods without a stream of the fourth domain lose there.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from openmimo.core import config as config_io
from openmimo.rl.config import CompareConfig, MopdConfig, RlConfig, RlEvaluation, RlSource
from recipes.tiny_cpu import TAUGHT, compare, mopd, rl_on

SIGNALS: dict[str, dict[str, Any]] = {
    "mopd": {"signal": "sampled"},
    "mopd_full": {"signal": "full"},
    "mopd_top_k": {"signal": "top_k", "top_k": 8},
    "soft_kd": {"signal": "forward", "writer": "teacher"},
    "sft_on_teachers": {"signal": "imitate", "writer": "teacher"},
    "rejection": {"signal": "imitate", "writer": "teacher", "min_reward": 1.0},
}
METHODS = (*SIGNALS, "mixed_rl", "sequential_rl", "average", "task_arithmetic")
EVALUATION = RlEvaluation(every_steps=1000, problems=50)


class Study:
    """The configs of all runs in one folder."""

    def __init__(self, arguments: argparse.Namespace):
        self.base, self.steps, self.few_prompts = arguments.base, arguments.steps, arguments.few_prompts
        self.folder = Path(arguments.folder)
        self.teacher_folder = Path(arguments.teachers or arguments.folder)
        self.teacher_steps = arguments.teacher_steps

    def teacher(self, name: str) -> RlConfig:
        """Returns the run of a teacher. Teachers always see all problems, even with `few_prompts`."""
        return self._placed(replace(rl_on(name), steps=self.teacher_steps), f"teacher_{name}", few=False)

    def student(self, method: str, seed: int) -> RlConfig:
        """Returns the run of a student for one method and seed."""
        if method == "mixed_rl":
            config = replace(rl_on(*TAUGHT), steps=self.steps)
        else:
            teachers = {name: f"{self.teacher_folder}/teacher_{name}/model" for name in TAUGHT} | {"lookup": "self"}
            config = replace(mopd(), teachers=teachers, steps=self.steps, **SIGNALS[method])
        return self._placed(replace(config, seed=seed), f"{method}_{seed}", few=True)

    def sequence(self, seed: int) -> list[RlConfig]:
        """Returns the runs of sequential RL. They have as many steps in total as other methods."""
        runs, start = [], self.base
        for name in TAUGHT:
            config = replace(rl_on(name), steps=self.steps // len(TAUGHT), seed=seed)
            runs.append(replace(self._placed(config, f"sequential_rl_{seed}_{name}", few=True), checkpoint=start))
            start = f"{runs[-1].run_folder}/model"
        return runs

    def comparison(self, methods: list[str], seeds: int) -> CompareConfig:
        """Returns the evaluation of all models in all domains."""
        models = {f"{name} teacher": (f"{self.teacher_folder}/teacher_{name}/model",) for name in TAUGHT}
        for method in methods:
            ends = [f"{method}_{seed}" for seed in range(seeds)]
            if method == "sequential_rl":
                ends = [f"{end}_{TAUGHT[-1]}" for end in ends]
            if method in ("average", "task_arithmetic"):
                ends = [method]
            models[method] = tuple(f"{self.folder}/{end}/model" for end in ends)
        return replace(compare(), run_folder=str(self.folder / "report"), base=self.base, models=models)

    def _placed(self, config: RlConfig, name: str, *, few: bool) -> Any:
        sources = tuple(self._limited(source) if few and self.few_prompts else source for source in config.sources)
        return replace(
            config,
            checkpoint=self.base,
            run_folder=str(self.folder / name),
            sources=sources,
            evaluation=EVALUATION,
            mtp_weight=0.0,
        )

    def _limited(self, source: RlSource) -> RlSource:
        return replace(source, options={**source.options, "distinct": self.few_prompts})


def run(config: RlConfig) -> float:
    """Runs or resumes a run in a process. Returns the CPU seconds of the process that finished it."""
    folder = Path(config.run_folder)
    if (folder / "model" / "config.json").exists():
        return json.loads((folder / "cpu_seconds.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    config_io.save(config, folder / "start.json")
    verb = "mopd" if isinstance(config, MopdConfig) else "rl"
    code = f"import runpy, sys; sys.argv[1:] = {[verb, '--from', str(folder / 'start.json')]!r}\n"
    code += "runpy.run_module('openmimo', run_name='__main__', alter_sys=True)"
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{folder} ended with status {status}:\n{(folder / 'log.txt').read_text()[-800:]}")
    seconds = usage.ru_utime + usage.ru_stime
    (folder / "cpu_seconds.json").write_text(json.dumps(seconds))
    print(f"{folder.name}: {seconds:.0f} CPU seconds", flush=True)
    return seconds


def merge(study: Study, method: str) -> None:
    """Merges the weights of the teachers by `average` or `task_arithmetic`."""
    destination = study.folder / method / "model"
    if not (destination / "config.json").exists():
        from openmimo.model.merge import merge as merge_checkpoints

        destination.parent.mkdir(parents=True, exist_ok=True)
        children = [f"{study.teacher_folder}/teacher_{name}/model" for name in TAUGHT]
        merge_checkpoints(study.base, children, str(destination), method=method)


def main() -> None:
    """Parses the command line, trains all models and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the fine-tuned checkpoint from which all runs start")
    parser.add_argument("--folder", default="runs/seesaw")
    parser.add_argument("--teachers", default="", help="folder of an earlier study whose teachers are reused")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=mopd().steps, help="optimizer steps of a student")
    parser.add_argument("--teacher-steps", type=int, default=rl_on(TAUGHT[0]).steps)
    parser.add_argument(
        "--few-prompts", type=int, default=0, help="number of prompts per domain that students see (0: unlimited)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    study = Study(arguments)
    study.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.processes) as pool:
        if not arguments.teachers:
            list(pool.map(run, [study.teacher(name) for name in TAUGHT]))
        jobs: list[Callable[[], Any]] = []
        for seed in range(arguments.seeds):
            for method in arguments.methods:
                if method == "sequential_rl":
                    jobs.append(lambda seed=seed: [run(config) for config in study.sequence(seed)])
                elif method not in ("average", "task_arithmetic"):
                    jobs.append(lambda method=method, seed=seed: run(study.student(method, seed)))
        list(pool.map(lambda job: job(), jobs))
    for method in ("average", "task_arithmetic"):
        if method in arguments.methods:
            merge(study, method)
    from openmimo.rl.compare import compare as compare_models

    compare_models(study.comparison(arguments.methods, arguments.seeds))
    seconds = {path.parent.name: json.loads(path.read_text()) for path in study.folder.glob("*/cpu_seconds.json")}
    for name, value in sorted(seconds.items()):
        print(f"{name:<28} {value:6.0f} CPU seconds")


if __name__ == "__main__":
    main()
