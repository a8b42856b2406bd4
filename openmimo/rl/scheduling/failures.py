"""Failures of rollouts: a warning for the first of each kind, and counts of all of them.

Without them, a run that loses all samples of a source to errors would look like any other run.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.markup import escape

from openmimo.core.errors import UserError
from openmimo.core.samples import Sample
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
