"""The loop of post-training: roll out, judge, learn, hand the new weights to the engine.

`openmimo rl` and `openmimo mopd` are this loop with different algorithms. In one process trainer and engine run the
very same model, so that new weights are there at once; whatever else rolls out implements `Rollouts`. Workers elsewhere
begin the next batch before the trainer learns from this one, and so are a version behind. Everything that decides what
happens next is in a checkpoint or in the event log behind it, so that a run killed at any moment goes on as if it had
not been, with no sample lost and none learned from twice.
"""

import functools
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from openmimo.core.errors import CheckpointError
from openmimo.core.interrupt import Interrupted, StopRequest, stop_requests
from openmimo.core.metrics import MetricsWriter
from openmimo.core.sample_files import write_state
from openmimo.core.samples import Sample
from openmimo.core.services import close_services, service_metrics
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.model.mimo import MiMo
from openmimo.model.recompute import checkpoint_activations
from openmimo.rl.agents.environment import open_environment
from openmimo.rl.agents.episode_calls import EpisodeCalls
from openmimo.rl.algorithm import algorithm_of
from openmimo.rl.config import MopdConfig, RlConfig
from openmimo.rl.evaluate import episode_opener, evaluate_policy, streams_of
from openmimo.rl.learning.policy_trainer import Objective, PolicyTrainer, UpdateReport, weighted_sum
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.rollouts.processes import ProcessRollouts
from openmimo.rl.rollouts.protocol import Rollouts
from openmimo.rl.rollouts.ray_workers import RayRollouts
from openmimo.rl.rollouts.worker import WorkerSetup
from openmimo.rl.scheduling.event_log import LoggedScheduler
from openmimo.rl.scheduling.failures import COUNTED, Failures
from openmimo.rl.scheduling.groups import LateReward
from openmimo.rl.scheduling.scheduler import DataScheduler
from openmimo.rl.teaching.distillation import Distillation
from openmimo.rl.teaching.teacher_rollouts import TeacherRollouts
from openmimo.train.checkpoint import Checkpoints, Progress, load_optimizer_state
from openmimo.train.schedule import warmed_cosine


class RlRun:
    """One run, from wherever its newest checkpoint left it.

    model: the policy, which the engine shares. start: how far the run is; optimizer_tensors: what belongs to it. Raises
    UserError for settings that contradict each other or the model.
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
    ):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.console = console or Console(stderr=True)
        self.run_folder = Path(config.run_folder)
        self.step, self.tokens = start.step, start.tokens
        self.algorithm, self.options = algorithm_of(config)
        if config.activation_checkpointing:
            checkpoint_activations(model)
        self.trainer = PolicyTrainer(
            model,
            config.optimizer,
            tokens_per_microbatch=config.tokens_per_microbatch,
            replay_routing=config.replay_routing,
            bias_rate=config.bias_rate,
            mtp_weight=config.mtp_weight,
        )
        if optimizer_tensors is not None:
            load_optimizer_state(model, self.trainer.optimizer, optimizer_tensors)
        self.trainer.guard.num_skipped = start.skipped
        self.trainer.guard.skipped_in_a_row = start.skipped_in_a_row
        self.engine = Engine(model, tokenizer, config.engine)
        opened = [open_environment(source.environment, source.options) for source in config.sources]
        instant = all(environment.is_instant(options) for environment, options in opened)
        self._calls = EpisodeCalls(threads=0 if instant else config.reward_threads, seconds=config.environment_seconds)
        self._failures = Failures(self.console, max_lost_steps=config.max_lost_steps)
        self._learned_nothing = False
        self.distillation = Distillation(config, model, self.console) if isinstance(config, MopdConfig) else None
        self.rollouts = self._open_rollouts()
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
        self._before_step: dict[str, Any] | None = None  # the scheduler's state when the step that is going on began
        self._stop = StopRequest()
        self.checkpoints = Checkpoints(self.run_folder, config.checkpoints, write_state=write_state)
        self.metrics = MetricsWriter(self.run_folder, tensorboard=config.tensorboard)
        self.metrics.truncate_after(start.step or -1)  # the evaluation before the first step comes again
        self.engine.update_weights(None, version=self.step)

    def run(self, *, stop_after_step: int | None = None) -> None:
        """Learns to the end, or to `stop_after_step`. Writes metrics and checkpoints on the way and one at the end.

        Raises:
            UserError: Rewards that are none, all samples of a source lost to errors, or a step that diverges.
            Interrupted: After SIGINT or SIGTERM; the last whole step then has a checkpoint.
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
        if self.step == 0:
            self._evaluate()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with ProgressBar(*columns, console=self.console) as bar:
            task = bar.add_task("rolling out", total=self.config.steps, completed=self.step)
            while self.step < last:
                self._end_if_asked()
                bar.update(task, description=_description(self._one_step()), completed=self.step)
        self._end_if_asked()
        self._failures.end_run()

    def _one_step(self) -> dict[str, Any]:
        """Rolls out a batch and learns from it. Returns its metrics."""
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
        self.rollouts.update_weights(self.step)
        values = _sample_metrics(samples) | {"learned_samples": sum(map(self._has_lesson, samples))}
        values |= {f"scheduler/{name}": value for name, value in report.items()}
        values |= failed | {"hung_calls": self._calls.num_hung}
        values |= _update_metrics(update) | (self.distillation.metrics() if self.distillation else {})
        values |= {"seconds/rollout": rolled_out - started, "seconds/update": learned - rolled_out}
        values |= self.rollouts.metrics() | service_metrics() | {"skipped_steps": self.trainer.guard.num_skipped}
        self.metrics.write(self.step, values)
        self._warn_if_nothing_was_learned(values)
        self._after_step()
        return values

    def _has_lesson(self, sample: Sample) -> bool:
        """Whether an annotated sample moved the policy: it has weight and, where they count, an advantage not 0."""
        by_divergence = self.distillation is not None and self.distillation.objective is not None
        return any(
            bool(((context.weights != 0) & (by_divergence | (context.advantages != 0))).any())
            for context in sample.contexts()
        )

    def _warn_if_nothing_was_learned(self, values: dict[str, Any]) -> None:
        """Says so at the first such step, and again only after one that learned."""
        has_learned = values["learned_samples"] > 0
        if not has_learned and not self._learned_nothing:
            dropped = {
                "never solved": values["scheduler/dropped_hard"],
                "always solved": values["scheduler/dropped_easy"],
                "one reward for all answers": values["scheduler/dropped_equal"],
                "errors": values["scheduler/dropped_error"],
                "too long prompts": values["scheduler/dropped_too_long"],
            }
            reasons = ", ".join(f"{reason}: {count:g}" for reason, count in dropped.items() if count)
            self.console.print(
                f"[yellow]warning:[/] step {self.step} learned nothing: of the {values['samples']} samples of its "
                f"batch none has an advantage. Groups dropped before: {reasons or 'none'}.",
                highlight=False,
            )
        self._learned_nothing = not has_learned

    def _end_if_asked(self) -> None:
        if self._stop.signal is None:
            return
        kept = self.checkpoints.save_before_end(self.step, self.save)
        self.rollouts.close()
        raise Interrupted(self._stop.signal, kept)

    def collect(self) -> tuple[list[list[Sample]], dict[str, float]]:
        """The next batch, and the scheduler's report of it."""
        if not self._early_step_began:
            self._before_step = self.log.scheduler.state()
            self._begin(self.step)
        self._early_step_began = False
        scheduler, has_news = self.log.scheduler, True
        while not scheduler.is_complete():
            self._end_if_asked()
            if has_news:
                self._submit_more()
            has_news = False
            is_busy = self.rollouts.num_running or self.rollouts.num_unscored
            assert is_busy or scheduler.is_complete(), "nothing runs, and the batch is not complete"
            for item in self.rollouts.poll():
                self._failures.add(item)
                if isinstance(item, LateReward):
                    self.log.on_reward(item)
                else:
                    self.log.on_sample(item)
                has_news = True
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
        """Begins the next step before this one is learned from, if workers can go on meanwhile.

        Its first tokens are then one version old when the step is learned from. The scheduler's state of now is kept:
        in a checkpoint, the next step has not begun, and what it did since is in the event log.
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
        """The optimizer steps of a batch: one for each part of its groups."""
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
                self._objective(),
                learning_rate=self._learning_rate(),
                version=self.step,
                old_logprobs=[old_of[id(sample)] for sample in part] if old else None,
                pack_key=lambda sample: sample.domain if self.distillation else "",
                gate=self.options.correction.limits(),
            )
            reports.append(report)
        return reports

    def _objective(self) -> Objective:
        if self.distillation is not None and self.distillation.objective is not None:
            return self.distillation.objective
        return weighted_sum(lambda token_batch: self.algorithm.token_losses(token_batch, self.options))

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
                self.console.print(f"[yellow]warning:[/] {error} Training goes on.", soft_wrap=True)

    def save(self) -> Path:
        """Writes a checkpoint of the last whole step. Raises DivergedError if the weights are of no use."""
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
        path = self.checkpoints.save(self.model, self.trainer.optimizer, self.tokenizer, progress)
        self.log.forget_before(self.step)
        return path

    def _evaluate(self) -> None:
        config, settings = self.config, self.config.evaluation
        # what an engine has not finished stays in it from step to step, with unfinished="partial"
        engine = Engine(self.model, self.tokenizer, config.engine) if self.engine.has_work else self.engine
        evaluation = evaluate_policy(
            engine,
            config.sources,
            problems=settings.problems,
            seed=config.seed,
            temperature=settings.temperature,
            calls=self._calls,
            timeout_reward=config.timeout_reward,
            thinking=config.thinking,
        )
        for text in evaluation.failures().values():
            self.console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False)
        values: dict[str, Any] = {f"evaluation/{name}": value for name, value in evaluation.means().items()}
        values |= {f"evaluation_errors/{name}": count for name, count in evaluation.num_errors.items()}
        values |= {f"evaluation_too_long/{name}": count for name, count in evaluation.num_too_long.items()}
        self.metrics.write(self.step, {**values, "evaluation/rewards": evaluation.rewards})

    def _open_rollouts(self) -> Rollouts:
        config = self.config
        if isinstance(config, MopdConfig) and config.writer == "teacher":
            domains = [source.name for source in config.sources]
            open_rollouts = functools.partial(self._engine_rollouts, record_routing=False)
            assert self.distillation is not None
            rollouts = TeacherRollouts(
                self.distillation.teachers, self.tokenizer, config.engine, domains, open_rollouts
            )
            rollouts.update_weights(self.step)
            return rollouts
        if config.rollouts == "engine":
            return self._engine_rollouts(self.engine)
        setup = WorkerSetup(
            self.model.config,
            self.tokenizer,
            config.engine,
            functools.partial(episode_opener, config.sources),
            compute_dtype=self.model.compute_dtype,
            reward_threads=0 if self._calls.is_instant else config.reward_threads,
            environment_seconds=config.environment_seconds,
            timeout_reward=config.timeout_reward,
            thinking=config.thinking,
            seed=config.seed,
        )
        kind = ProcessRollouts if config.rollouts == "processes" else RayRollouts
        return kind(self.model, setup, num_workers=config.rollout_workers, version=self.step)

    def _engine_rollouts(self, engine: Engine, *, record_routing: bool = True) -> EngineRollouts:
        return EngineRollouts(
            engine,
            episode_opener(self.config.sources),
            calls=self._calls,
            timeout_reward=self.config.timeout_reward,
            seed=self.config.seed,
            record_routing=record_routing,
            thinking=self.config.thinking,
            late_rewards=not self._calls.is_instant,
        )


def _description(values: dict[str, Any]) -> str:
    """What the progress bar says of the last step."""
    parts = [f"reward {values['reward/mean']:.2f}" if values["samples"] else "no samples"]
    parts += [f"{values[name]} {name.replace('_', ' ')}" for name in COUNTED if values[name]]
    return ", ".join(parts)


def _parts(batch: list[list[Sample]], count: int) -> list[list[Sample]]:
    """The groups in `count` parts of nearly the same size, empty ones left out; groups stay whole."""
    edges = [round(len(batch) * part / count) for part in range(count + 1)]
    parts = [[sample for group in batch[start:stop] for sample in group] for start, stop in zip(edges, edges[1:])]  # noqa: B905
    return [part for part in parts if part]


def _sample_metrics(samples: list[Sample]) -> dict[str, Any]:
    """Rewards and lengths of a batch, over all and by domain; no means of nothing."""
    values: dict[str, Any] = {"samples": len(samples)}
    if not samples:
        return values
    for domain in ("", *dict.fromkeys(sample.domain for sample in samples)):
        own = [sample for sample in samples if domain in ("", sample.domain)]
        suffix = f"/{domain}" if domain else ""
        values[f"reward{suffix}/mean"] = _mean([sample.reward for sample in own])
        contexts = [context for sample in own for context in sample.contexts()]
        written = sum(context.num_answer_tokens for context in contexts)
        values[f"answer_tokens{suffix}/mean"] = written / len(own)
        values[f"contexts{suffix}/mean"] = len(contexts) / len(own)
    return values | {"length_limit_share": _mean([sample.finish_reason == "length" for sample in samples])}


def _update_metrics(reports: list[UpdateReport]) -> dict[str, Any]:
    """Means over the optimizer steps of a batch that had something to learn from."""
    reports = [report for report in reports if report.num_tokens]
    if not reports:
        return {}
    values = {name: _mean([report.diagnostics[name] for report in reports]) for name in reports[0].diagnostics}
    values["loss"] = _mean([report.loss for report in reports])
    values["gradient/norm"] = _mean([report.gradient_norm for report in reports])
    values["gradient/num_zeros"] = reports[-1].num_zero_gradients
    for domain in sorted({domain for report in reports for domain in report.gradient_shares}):
        values[f"gradient_share/{domain}"] = _mean([report.gradient_shares.get(domain, 0.0) for report in reports])
    for layer, load_E in reports[-1].load.items():
        values[f"expert_load/max_over_mean_{layer}"] = float(load_E.max() / load_E.float().mean())
    return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
