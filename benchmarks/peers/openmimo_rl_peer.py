"""The side of openmimo in `bench_rl` (see `serving`): single steps of `openmimo rl` and `openmimo mopd`."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from digit_reward import digit_share
from serving import cost_of, serve

from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import load_model
from openmimo.rl.agents.environment import EnvResponse
from openmimo.rl.config import MopdConfig, RlConfig, RlEvaluation, RlSource
from openmimo.rl.environments import task
from openmimo.rl.loop import RlRun
from openmimo.rl.scheduling.problems import Problem
from openmimo.train.checkpoint import Progress
from openmimo.train.config import CheckpointConfig
from recipes.tiny_cpu import ROLLOUTS

_NEVER = 10**9


class _Digits(task.TaskEpisode):
    """An episode with the prompts of a task and the common reward."""

    def respond(self, text: str) -> EnvResponse:
        """Stores the answer and ends the episode."""
        self._answer = text
        return EnvResponse()

    def reward(self) -> float:
        """Returns the share of digits in the answer."""
        return digit_share(self._answer)


def _open(problem: Problem, options: task.Options) -> _Digits:
    return _Digits(task.open_task(options.task), problem.content, options.system)


DIGITS = replace(task.PLUGIN, open=_open)


class _Run(RlRun):
    """A run whose steps are called one at a time."""

    def step_once(self) -> None:
        """Runs one step of `run`."""
        self._one_step()


class OpenMiMo:
    """`RlRun` in float32 with the engine settings of the recipes, without drafts and without a loss of MTP heads."""

    def load(
        self, folder: str, run_folder: str, threads: int, task: dict, groups: int, samples_per_prompt: int,
        new_tokens: int, end_ids: list[int], learning_rate: float, teacher: str | None = None,
        signal: str | None = None,
    ) -> dict[str, str]:  # fmt: skip
        """Prepares a run.

        Args:
            folder: The checkpoint.
            run_folder: Folder of the run.
            threads: CPU threads.
            task: Fields of `TaskConfig`.
            groups: Prompts per step.
            samples_per_prompt: Answers per prompt.
            new_tokens: Maximum tokens of an answer.
            end_ids: Tokens that end an answer.
            learning_rate: Learning rate.
            teacher: Checkpoint of the teacher (None: GRPO).
            signal: Signal of the teacher (None: GRPO).
        """
        torch.set_num_threads(threads)
        source = RlSource(
            name="sorting", environment=f"{__name__}:DIGITS", options={"task": task}, max_answer_tokens=new_tokens,
            samples_per_prompt=samples_per_prompt,
        )  # fmt: skip
        settings = {
            "checkpoint": folder, "run_folder": run_folder, "sources": (source,), "steps": _NEVER,
            "groups_per_step": groups, "learning_rate": learning_rate, "dynamic_sampling": False, "easy_fraction": None,
            "mtp_weight": 0.0, "device": "cpu", "dtype": "float32", "engine": ROLLOUTS,
            "checkpoints": CheckpointConfig(every_steps=_NEVER), "evaluation": RlEvaluation(every_steps=_NEVER),
        }  # fmt: skip
        if signal is None:
            config = RlConfig(**settings)
        else:
            config = MopdConfig(**settings, teachers={"sorting": teacher}, signal=signal)
        model = load_model(folder, dtype="float32", device="cpu")
        model.compute_dtype = torch.float32
        self._run = _Run(config, model, Tokenizer.load(folder), start=Progress.beginning())
        self._run.engine.eos_ids = frozenset(end_ids)
        self._metrics = Path(run_folder) / "metrics.jsonl"
        return {"versions": f"torch {torch.__version__}", "notes": ""}

    def steps(self, count: int) -> list[dict[str, float]]:
        """Returns the cost of each step, with `generate_ms` (rollout) and `new_tokens` of the whole batch."""
        return [cost_of(self._run.step_once) | self._last_step() for _ in range(count)]

    def _last_step(self) -> dict[str, float]:
        values = json.loads(self._metrics.read_text().splitlines()[-1])
        return {
            "generate_ms": 1e3 * values["seconds/rollout"],
            "new_tokens": round(values["answer_tokens/mean"] * values["samples"]),
        }


if __name__ == "__main__":
    serve(OpenMiMo())
