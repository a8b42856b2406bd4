"""The loop of post-training: roll out, score, learn, pass the new weights to the rollouts.

`openmimo rl` and `openmimo mopd` are this loop with different algorithms. In one process, trainer and engine share one
model, so that new weights need no transfer. Workers in other processes start the next batch before the trainer learns
from this one, and so are one version behind. The whole state is in a checkpoint and in the event log after it: a run
that is killed at any moment continues as if it had not been, without a sample that is lost or learned from twice.
"""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from openmimo.core.errors import CheckpointError, Interrupted, StopRequest, stop_requests
from openmimo.core.metrics import MetricsWriter, TimeLeft
from openmimo.core.sample_files import write_state
from openmimo.core.samples import Sample
from openmimo.core.services import close_services, service_metrics
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.mimo import MiMo
from openmimo.rl.algorithm import algorithm_of
from openmimo.rl.config import RlConfig
from openmimo.rl.evaluate import evaluation_of, streams_of
from openmimo.rl.learner import Learner, LocalLearner
from openmimo.rl.learning.policy_trainer import UpdateReport
from openmimo.rl.scheduling.event_log import LoggedScheduler
from openmimo.rl.scheduling.groups import LateReward
from openmimo.rl.scheduling.scheduler import DataScheduler
from openmimo.rl.step_metrics import (
    Failures,
    has_lesson,
    nothing_learned_text,
    progress_text,
    sample_metrics,
    update_metrics,
)
from openmimo.train.checkpoint import Checkpoints, Progress
from openmimo.train.optim import warmed_cosine


class RlRun:
    """One run of post-training, from its beginning or its newest checkpoint.

    Attributes:
        step: Finished steps, which is also the version of the policy.
        tokens: Tokens of all samples so far.
        trainer: Updates the policy.
        rollouts: Roll out samples.
        log: The scheduler, with the log of its calls.
        learner: What the run learns with; it has trainer, rollouts and distillation.
        distillation: The teachers of a distillation run.
    """

    def __init__(
        self,
        config: RlConfig,
        model: MiMo,
        tokenizer: Tokenizer,
        *,
        start: Progress,
        optimizer_tensors: dict[str, torch.Tensor] | None = None,
        console: Console | None = None,
        learner: Learner | None = None,
    ):
        """
        Args:
            config: The config of the run.
            model: The policy, which the engine shares.
            tokenizer: The tokenizer of the policy.
            start: The progress in the checkpoint.
            optimizer_tensors: The state of the optimizer in the checkpoint.
            console: Prints warnings and progress (None: on stderr).
            learner: Trainer, engine, rollouts and teachers of the policy (None: those of one process).

        Raises:
            UserError: Settings contradict each other or the model.
        """
        self.config, self.tokenizer = config, tokenizer
        self.console = console or Console(stderr=True)
        self.run_folder = Path(config.run_folder)
        self.step, self.tokens = start.step, start.tokens
        self.algorithm, self.options = algorithm_of(config)
        self.learner: Learner = learner or LocalLearner(
            config, model, tokenizer, start=start, optimizer_tensors=optimizer_tensors, console=self.console
        )
        self.trainer, self.engine, self.rollouts = self.learner.trainer, self.learner.engine, self.learner.rollouts
        self.distillation = self.learner.distillation
        self._calls = self.learner.calls
        self._failures = Failures(self.console, max_lost_steps=config.max_lost_steps)
        self._learned_nothing = False
        scheduler = DataScheduler(config.scheduler(), streams_of(config.sources, "train", config.seed))
        if start.loader:
            scheduler.load_state(start.loader)
        self.log = LoggedScheduler(
            scheduler,
            self.run_folder / "events",
            start=start.step,
            repeats_exactly=self.rollouts.repeats_exactly,
        )
        self._early_step_began = False
        self._before_step: dict[str, Any] | None = None  # the scheduler's state at the start of the current step
        self._stop = StopRequest()
        self.checkpoints = Checkpoints(self.run_folder, config.checkpoints, write_state=write_state)
        self.metrics = MetricsWriter(self.run_folder, tensorboard=config.tensorboard)
        self.metrics.truncate_after(start.step or -1)  # the evaluation before the first step is repeated

    def run(self, *, stop_after_step: int | None = None) -> None:
        """Run to the last step, or to `stop_after_step`. Writes metrics and checkpoints.

        Raises:
            UserError: A reward is no number from 0 to 1, a source lost all samples to errors, or a step diverged.
            Interrupted: SIGINT or SIGTERM ended the run; the last finished step then has a checkpoint.
        """
        last = self.config.steps if stop_after_step is None else min(self.config.steps, stop_after_step)
        try:
            with self.checkpoints.named_in_errors(), stop_requests() as self._stop:
                self._run(last)
        finally:
            self.rollouts.close()
            self._calls.close()
            close_services()
            self.metrics.close()
            self.log.close()

    def _run(self, last: int) -> None:
        self.trainer.check_weights(f"that step {self.step + 1} begins with")
        self._print_sharing()
        if self.step == 0:
            self._evaluate()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        time_left = TimeLeft(1)
        with ProgressBar(*columns, console=self.console) as bar:
            task = bar.add_task("rolling out", total=self.config.steps, completed=self.step)
            while self.step < last:
                self._end_if_stopped()
                values = self._one_step()
                bar.update(task, description=progress_text(values), completed=self.step)
                seconds = values["seconds/rollout"] + values["seconds/update"]
                if said := time_left.after_step(seconds, 1, last - self.step):
                    self.console.print(said)
        self._end_if_stopped()
        self._failures.end_run()

    def _print_sharing(self) -> None:
        """Print once that updates compute the prompt of a group for each of its samples, if they do."""
        if self.trainer.trains_heads and any(source.samples_per_prompt > 1 for source in self.config.sources):
            self.console.print(
                "Updates train the MTP heads, whose labels cross the end of the prompt, so each sample computes its "
                "prompt again. With mtp_weight 0, the samples of a prompt share it.",
                highlight=False,
                soft_wrap=True,
            )

    def _one_step(self) -> dict[str, Any]:
        """Roll out a batch and learn from it. Returns the metrics of the step."""
        started = time.perf_counter()
        batch, report = self.collect()
        failed = self._failures.end_step(report, [source.name for source in self.config.sources])
        rolled_out = time.perf_counter()
        samples = [sample for group in batch for sample in group]
        self._begin_early()
        update = self._learn(batch)
        learned = time.perf_counter()
        self.step += 1
        self.tokens += sum(len(context) for sample in samples for context in sample.contexts())
        self.learner.update_weights(self.step)
        by_divergence = self.distillation is not None and self.distillation.objective is not None
        num_learned = sum(has_lesson(sample, by_divergence=by_divergence) for sample in samples)
        values = sample_metrics(samples) | {"learned_samples": num_learned}
        values |= {f"scheduler/{name}": value for name, value in report.items()}
        values |= failed | {"hung_calls": self._calls.num_hung}
        values |= update_metrics(update) | (self.distillation.metrics() if self.distillation else {})
        values |= {"seconds/rollout": rolled_out - started, "seconds/update": learned - rolled_out}
        values |= self.rollouts.metrics() | service_metrics() | {"skipped_steps": self.trainer.guard.num_skipped}
        self.metrics.write(self.step, values)
        self._warn_if_nothing_was_learned(values)
        self._after_step()
        return values

    def _warn_if_nothing_was_learned(self, values: dict[str, Any]) -> None:
        """Warn at the first such step, and again only after a step that learned."""
        has_learned = values["learned_samples"] > 0
        if not has_learned and not self._learned_nothing:
            self.console.print(f"[yellow]warning:[/] {nothing_learned_text(self.step, values)}", highlight=False)
        self._learned_nothing = not has_learned

    def _end_if_stopped(self) -> None:
        if self._stop.signal is None:
            return
        kept = self.checkpoints.save_before_end(self.step, self.save)
        self.rollouts.close()
        raise Interrupted(self._stop.signal, kept)

    def collect(self) -> tuple[list[list[Sample]], dict[str, float]]:
        """Roll out the next batch. Returns its groups, and the scheduler's report of the step."""
        if not self._early_step_began:
            self._before_step = self.log.scheduler.state()
            self._begin(self.step)
        self._early_step_began = False
        scheduler, has_results = self.log.scheduler, True
        while not scheduler.is_complete():
            self._end_if_stopped()
            if has_results:
                self._submit_more()
            has_results = False
            is_busy = self.rollouts.num_running or self.rollouts.num_unscored
            assert is_busy or scheduler.is_complete(), "nothing runs, and the batch is not complete"
            for item in self.rollouts.poll():
                self._failures.add(item)
                if isinstance(item, LateReward):
                    self.log.on_reward(item)
                else:
                    self.log.on_sample(item)
                has_results = True
            self.rollouts.cancel(scheduler.take_cancelled())
        if self.config.unfinished == "partial":
            for sample in self.rollouts.interrupt():
                self.log.on_partial(sample)
        batch, report = self.log.take_batch()
        self._before_step = None
        self.rollouts.cancel(scheduler.take_cancelled())
        return batch, report

    def _begin(self, step: int) -> None:
        for request in self.log.begin_step(step):
            self.rollouts.submit(request)

    def _begin_early(self) -> None:
        """Begin the next step before the trainer learns from this one, if workers run meanwhile.

        The first tokens of the next batch are then one version old. A checkpoint gets the scheduler's state from before
        the next step; the calls since then are in the event log.
        """
        can_continue = self.rollouts.runs_while_learning and self.config.unfinished == "partial"
        if can_continue and self.step + 1 < self.config.steps:
            self._early_step_began = True
            self._before_step = self.log.scheduler.state()
            self._begin(self.step + 1)
            if not self.log.knows(self.step + 1):
                self._submit_more()

    def _submit_more(self) -> None:
        free = self.config.max_running - self.rollouts.num_running
        for request in self.log.next_submissions(free) if free > 0 else ():
            self.rollouts.submit(request)

    def _learn(self, batch: list[list[Sample]]) -> list[UpdateReport]:
        """Take the optimizer steps of a batch, one for each part of its groups."""
        batch = [[context for sample in group for context in sample.contexts()] for group in batch]
        samples = [sample for group in batch for sample in group]
        parts = _parts(batch, self.config.updates_per_step)
        old = self.trainer.logprobs(samples) if len(parts) > 1 else []
        old_of = {id(sample): logprobs for sample, logprobs in zip(samples, old, strict=bool(old))}
        reports = []
        for part in parts:
            if self.distillation is not None:
                self.distillation.annotate(part, self.trainer, self.algorithm, self.options)
            else:
                self.algorithm.annotate(part, self.options, [[] for _ in part])
            report = self.trainer.update(
                part,
                self.learner.objective(),
                learning_rate=self._learning_rate(),
                version=self.step,
                old_logprobs=[old_of[id(sample)] for sample in part] if old else None,
                pack_key=lambda sample: sample.domain if self.distillation else "",
                gate=self.options.correction.limits(),
            )
            reports.append(report)
        return reports

    def _learning_rate(self) -> float:
        config, peak = self.config, self.config.learning_rate
        end = peak if config.end_learning_rate is None else config.end_learning_rate
        return warmed_cosine(self.step, steps=config.steps, peak=peak, end=end, warmup_steps=config.warmup_steps)

    def _after_step(self) -> None:
        is_last = self.step == self.config.steps
        if self.step % self.config.evaluation.every_steps == 0 or is_last:
            self._evaluate()
        if self.step % self.config.checkpoints.every_steps == 0 or is_last:
            try:
                self.save()
            except CheckpointError as error:
                if is_last:
                    raise
                self.console.print(f"[yellow]warning:[/] {error} Training continues.", soft_wrap=True)

    def save(self) -> Path:
        """Write a checkpoint of the last finished step. Raises DivergedError if the weights are not finite."""
        self.trainer.check_weights(f"after step {self.step}")
        self.metrics.sync()
        self.log.sync()
        guard = self.trainer.guard
        progress = Progress(
            self.step,
            self.tokens,
            0,
            self._before_step or self.log.scheduler.state(),
            skipped=guard.num_skipped,
            skipped_in_a_row=guard.skipped_in_a_row,
        )
        model, optimizer_tensors = self.learner.saved()
        path = self.checkpoints.save(model, optimizer_tensors, self.tokenizer, progress)
        self.log.forget_before(self.step)
        return path

    def _evaluate(self) -> None:
        evaluation = evaluation_of(self.learner.roll_out_held_out())
        for text in evaluation.failures().values():
            self.console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False)
        values: dict[str, Any] = {f"evaluation/{name}": value for name, value in evaluation.means().items()}
        values |= {f"evaluation_errors/{name}": count for name, count in evaluation.num_errors.items()}
        values |= {f"evaluation_too_long/{name}": count for name, count in evaluation.num_too_long.items()}
        self.metrics.write(self.step, {**values, "evaluation/rewards": evaluation.rewards})


def _parts(batch: list[list[Sample]], count: int) -> list[list[Sample]]:
    """Divide whole groups into at most `count` parts of nearly the same size, without empty parts."""
    edges = [round(len(batch) * part / count) for part in range(count + 1)]
    parts = [[sample for group in batch[start:stop] for sample in group] for start, stop in zip(edges, edges[1:])]  # noqa: B905
    return [part for part in parts if part]
