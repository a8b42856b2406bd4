"""The metrics of one step of post-training, and failures of rollouts: counts, and a warning for the first of each kind.

Without the warnings, a run that loses all samples of a source to errors would look like any other run.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from openmimo.core.errors import UserError
from openmimo.core.samples import Sample
from openmimo.rl.learning.policy_trainer import UpdateReport
from openmimo.rl.scheduling.groups import LateReward

COUNTED = ("errors", "timeouts", "too_long_prompts")


class Failures:
    """Counts samples without a reward, by source, and ends a run in which a source has no others.

    Args:
        console: Prints warnings.
        max_lost_steps: Consecutive steps in which a source may lose every sample to errors.
    """

    def __init__(self, console: Console, *, max_lost_steps: int = 0):
        self._console, self._max_lost_steps = console, max_lost_steps
        self._shown: set[tuple[str, str]] = set()
        self._counts: Counter[str] = Counter()
        self._last_error: dict[str, str] = {}
        self._shortest_prompt: dict[str, tuple[int, int]] = {}  # by source, with its limit
        self._lost_steps: Counter[str] = Counter()
        self._scored: set[str] = set()

    @property
    def num_failed(self) -> int:
        """Samples of this step that failed, or whose prompt is too long."""
        return self._counts["errors"] + self._counts["too_long_prompts"]

    def add(self, sample: Sample | LateReward) -> None:
        """Count the failure of a sample or of its scoring, and print the first of its kind."""
        source, problem = sample.domain, sample.info.get("problem", "")
        self._counts["timeouts"] += bool(sample.info.get("timeout"))
        if sample.finish_reason == "error":
            self._counts["errors"] += 1
            error = str(sample.info.get("error", "the cause is not known"))
            self._last_error[source] = f"{error} (problem {problem})"
            self._show(
                source, str(sample.info.get("error_kind", "")),
                f"source {source!r} lost a sample of problem {problem}: {error}. It is rolled out again; more "
                "of this kind are counted in the metrics and not shown.",
            )  # fmt: skip
        elif sample.finish_reason == "too_long":
            self._counts["too_long_prompts"] += 1
            length = (sample.info["prompt_tokens"], sample.info["limit"])
            self._shortest_prompt[source] = min(length, self._shortest_prompt.get(source, length))
            self._show(
                source, "too_long",
                f"source {source!r}: the prompt of problem {problem} has {length[0]} tokens, and at most {length[1]} "
                "are allowed. The problem is dropped; more of them are counted in the metrics and not shown.",
            )  # fmt: skip
        elif sample.info.get("timeout"):
            self._show(
                source, "timeout",
                f"source {source!r}: the environment exceeded its deadline on problem {problem}, which gets the "
                f"reward {sample.reward:g} (timeout_reward); more of this kind are counted in the metrics, not shown.",
            )  # fmt: skip

    def end_step(self, report: Mapping[str, float], sources: Iterable[str]) -> dict[str, int]:
        """Return the counts of the step, and start those of the next.

        Args:
            report: The scheduler's report, which includes samples that an earlier process rolled out.
            sources: The names of all sources.

        Raises:
            UserError: A source lost every sample to errors in more than `max_lost_steps` steps in a row, or all its
                prompts are too long.
        """
        counts, self._counts = {name: self._counts[name] for name in COUNTED}, Counter()
        for source in sources:
            if report[f"{source}/accepted"] or report[f"{source}/scored"]:
                self._lost_steps[source] = 0
                self._scored.add(source)
            elif report[f"{source}/errors"]:
                self._lost_steps[source] += 1
                if self._lost_steps[source] > self._max_lost_steps:
                    raise UserError(self._lost_message(source, self._lost_steps[source]))
            elif report[f"{source}/dropped_too_long"]:
                raise UserError(self._too_long_message(source))
        return counts

    def end_run(self) -> None:
        """Raises UserError for a source that lost every sample of the whole run."""
        for source, steps in self._lost_steps.items():
            if steps and source not in self._scored:
                raise UserError(self._lost_message(source, steps))

    def _lost_message(self, source: str, steps: int) -> str:
        last = self._last_error.get(source, "see the warnings of the earlier process")
        span = "a step" if steps == 1 else f"{steps} steps in a row"
        return (
            f"source {source!r} lost every sample of {span} to errors, so it has nothing to learn from. The last: "
            f"{last}. Correct the environment, or allow more such steps in a row (max_lost_steps)."
        )

    def _too_long_message(self, source: str) -> str:
        shortest, limit = self._shortest_prompt.get(source, (0, 0))
        return (
            f"every prompt of source {source!r} is too long: the shortest has {shortest} tokens, and at most {limit} "
            "are allowed. Raise the source's max_prompt_tokens, use shorter problems, or a model with a longer "
            "context (max_position_embeddings in its config.json)."
        )

    def _show(self, source: str, kind: str, text: str) -> None:
        if (source, kind) not in self._shown:
            self._shown.add((source, kind))
            self._console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False)


def sample_metrics(samples: list[Sample]) -> dict[str, Any]:
    """Mean rewards and lengths of a batch, over all samples and by domain; only the count if there are no samples."""
    values: dict[str, Any] = {"samples": len(samples)}
    if not samples:
        return values
    for domain in ("", *dict.fromkeys(sample.domain for sample in samples)):
        of_domain = [sample for sample in samples if domain in ("", sample.domain)]
        suffix = f"/{domain}" if domain else ""
        values[f"reward{suffix}/mean"] = _mean(sample.reward for sample in of_domain)
        contexts = [context for sample in of_domain for context in sample.contexts()]
        num_written = sum(context.num_answer_tokens for context in contexts)
        values[f"answer_tokens{suffix}/mean"] = num_written / len(of_domain)
        values[f"contexts{suffix}/mean"] = len(contexts) / len(of_domain)
    return values | {"length_limit_share": _mean(sample.finish_reason == "length" for sample in samples)}


def update_metrics(reports: list[UpdateReport]) -> dict[str, Any]:
    """Means over the optimizer steps of a batch that had tokens."""
    reports = [report for report in reports if report.num_tokens]
    if not reports:
        return {}
    values: dict[str, Any] = {
        name: _mean(report.diagnostics[name] for report in reports) for name in reports[0].diagnostics
    }
    values["loss"] = _mean(report.loss for report in reports)
    values["gradient/norm"] = _mean(report.gradient_norm for report in reports)
    values["gradient/num_zeros"] = reports[-1].num_zero_gradients
    for domain in sorted({domain for report in reports for domain in report.gradient_shares}):
        values[f"gradient_share/{domain}"] = _mean(report.gradient_shares.get(domain, 0.0) for report in reports)
    for layer, load_E in reports[-1].load.items():
        values[f"expert_load/max_over_mean_{layer}"] = float(load_E.max() / load_E.float().mean())
    return values


def has_lesson(sample: Sample, *, by_divergence: bool) -> bool:
    """Whether an annotated sample changes the policy: a token has a weight and an advantage that are not 0.

    With `by_divergence`, the loss is a divergence from a teacher, and the weight alone counts.
    """
    return any(
        bool(((context.weights != 0) & (by_divergence | (context.advantages != 0))).any())
        for context in sample.contexts()
    )


def nothing_learned_text(step: int, values: dict[str, Any]) -> str:
    """The warning about a step without a learned sample, with the groups that the scheduler dropped."""
    dropped = {
        "never solved": values["scheduler/dropped_hard"],
        "always solved": values["scheduler/dropped_easy"],
        "one reward for all answers": values["scheduler/dropped_equal"],
        "errors": values["scheduler/dropped_error"],
        "too long prompts": values["scheduler/dropped_too_long"],
    }
    reasons = ", ".join(f"{reason}: {count:g}" for reason, count in dropped.items() if count)
    return (
        f"step {step} learned nothing: of the {values['samples']} samples of its batch none has an advantage. Groups "
        f"dropped before: {reasons or 'none'}."
    )


def progress_text(values: dict[str, Any]) -> str:
    """The text of the progress bar after a step."""
    parts = [f"reward {values['reward/mean']:.2f}" if values["samples"] else "no samples"]
    parts += [f"{values[name]} {name.replace('_', ' ')}" for name in COUNTED if values[name]]
    return ", ".join(parts)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
