"""The metrics of one step of post-training, and the messages that follow from them."""

from collections.abc import Iterable
from typing import Any

from openmimo.core.samples import Sample
from openmimo.rl.learning.policy_trainer import UpdateReport
from openmimo.rl.scheduling.failures import COUNTED


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
