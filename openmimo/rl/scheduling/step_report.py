"""The report of a step of the data scheduler: counters by source, means, and the age of the batch."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from openmimo.rl.scheduling.groups import Group
from openmimo.rl.scheduling.problems import ProblemSource

WASTED = ("dropped_stale", "dropped_error", "surplus", "aborted")
COUNTED = (
    "drawn", "drawn_easy", "carried_in", "accepted", "dropped_easy", "dropped_hard", "dropped_equal",
    "dropped_too_long", *WASTED, "scored", "errors", "late",
)  # fmt: skip


def step_report(
    version: int,
    sources: Mapping[str, ProblemSource],
    *,
    counts: Mapping[str, Counter[str]],
    quotas: Mapping[str, int],
    taken: Mapping[str, int],
    groups: Iterable[Group],
) -> dict[str, float]:
    """Counters over all sources, and as `source/...` counters and means of each source; see `DataScheduler.report`.

    Args:
        version: The policy version of the step.
        sources: By name, the sources.
        counts: By source, the counters of the step.
        quotas: By source, the groups in the batch of the step.
        taken: By source, the groups that the batch has now.
        groups: All groups that the trainer may still learn from.
    """
    groups = list(groups)
    totals: Counter[str] = Counter()
    report: dict[str, float] = {}
    for name, source in sources.items():
        of_source = [group for group in groups if group.source == name]
        values = {key: counts[name][key] for key in COUNTED} | {"quota": quotas[name]}
        values["accepted"] += taken[name]
        values["short"] = values["quota"] - values["accepted"]
        values["in_flight"] = len(of_source) - taken[name]
        values["unscored"] = sum(group.num_unscored for group in of_source)
        totals.update(values | {key: counts[name][key] for key in ("samples_used", "samples_wasted")})
        report |= {f"{name}/{key}": value for key, value in values.items()}
        report |= {f"{name}/{key}": value for key, value in source.means().items()}
    used, wasted = totals.pop("samples_used"), totals.pop("samples_wasted")
    return {"version": version, **totals, "waste_share": wasted / max(1, used + wasted), **report}


def batch_report(groups: list[Group], version: int) -> dict[str, float]:
    """The share of samples of a batch with tokens older than `version`, and the share of its tokens at each age."""
    ages: Counter[int] = Counter()
    for group in groups:
        for member in group.members:
            assert member.sample is not None, "a group of a batch is finished"
            versions, counts = np.unique(member.sample.written_versions(), return_counts=True)
            ages.update(dict(zip((version - versions).tolist(), counts.tolist(), strict=True)))
    num_samples = sum(len(group.members) for group in groups)
    num_partial = sum(group.num_partial(version) for group in groups)
    histogram = {f"staleness/{age}": count / ages.total() for age, count in sorted(ages.items())}
    return {"partial_share": num_partial / max(1, num_samples), **histogram}
