"""Whether the load of a layer is transient or stable (arXiv 2404.16914 names the states and gives no detector).

The trace is cut into windows. Two numbers describe a window of a layer:

- dispersion: variance of an expert's share within the window over that of sampling; the median over the experts.
  About 1 if each step draws from the same shares. It does not depend on the batch size, as the plain variance does.
- shift: squared change of an expert's mean share since the window `span_windows` before, over the variance of that
  change; the mean over the experts. About 1 if the shares did not change. A slow drift adds up over the span. The
  variance of a window's mean comes from the means of its fifths, because neighboring steps read related text.

A layer is stable if the shift, and the dispersion of all windows of the span, are below their limits.
"""

from dataclasses import dataclass

import numpy as np

from openmimo.core.load_trace import LoadTrace
from openmimo.parallel.expert_load.config import DetectorConfig
from openmimo.parallel.expert_load.forecast import share_deviation


@dataclass(frozen=True)
class LoadState:
    """The state of each layer over time.

    Attributes:
        ends: Index of the step after each window, [windows].
        dispersion: Dispersion, float64 [windows, layers].
        shift: Shift, float64 [windows, layers]; infinite for the windows of the first span.
        is_stable: Whether the layer is stable at the end of the window, bool [windows, layers].
    """

    ends: np.ndarray
    dispersion: np.ndarray
    shift: np.ndarray
    is_stable: np.ndarray

    def stable_from(self, layer: int) -> int | None:
        """Index of the step from which row `layer` is stable up to the end (None: it is not stable at the end)."""
        unstable = np.flatnonzero(~self.is_stable[:, layer])
        first = int(unstable[-1]) + 1 if len(unstable) else 0
        return int(self.ends[first]) if first < len(self.ends) else None


def detect_state(trace: LoadTrace, config: DetectorConfig) -> LoadState:
    """Describe each whole window of a trace. The steps left over are those at its beginning."""
    w = config.window_steps
    num_windows, left_over = divmod(len(trace.steps), w)
    shape = (num_windows, w, *trace.counts.shape[1:])
    windows_WwLE = trace.shares[left_over:].reshape(shape)
    slots_WwL = np.maximum(trace.slots[left_over:].reshape(shape[:3]), 1)
    mean_WLE, variance_WLE = windows_WwLE.mean(axis=1), windows_WwLE.var(axis=1, ddof=1)
    slots_WL1 = 1.0 / (1.0 / slots_WwL).mean(axis=1)[..., None]
    sampled_WLE = share_deviation(mean_WLE, slots_WL1, trace.header.experts_per_token) ** 2
    dispersion_WLE = np.divide(variance_WLE, sampled_WLE, out=np.full_like(mean_WLE, np.nan), where=sampled_WLE > 0)
    dispersion = np.nan_to_num(np.nanmedian(dispersion_WLE, axis=-1), nan=0.0)

    shift = np.full(dispersion.shape, np.inf)
    span = min(config.span_windows, num_windows)
    change_WLE = (mean_WLE[span:] - mean_WLE[: num_windows - span]) ** 2
    of_mean_WLE = _variance_of_mean(windows_WwLE)
    expected_WLE = of_mean_WLE[span:] + of_mean_WLE[: num_windows - span]
    known = expected_WLE > 0
    ratio_WLE = np.divide(change_WLE, expected_WLE, out=np.zeros_like(change_WLE), where=known)
    shift[span:] = ratio_WLE.sum(axis=-1) / np.maximum(known.sum(axis=-1), 1)

    is_stable = shift < config.max_shift
    for end in range(span, num_windows):
        is_stable[end] &= (dispersion[end - span + 1 : end + 1] < config.max_dispersion).all(axis=0)
    return LoadState(left_over + w * np.arange(1, num_windows + 1), dispersion, shift, is_stable)


_PARTS = 5


def _variance_of_mean(windows_WwLE: np.ndarray) -> np.ndarray:
    """Return the variance of the mean of each window, from the means of five parts; a remainder is left out."""
    parts = min(_PARTS, windows_WwLE.shape[1])
    length = windows_WwLE.shape[1] // parts
    means = windows_WwLE[:, : parts * length].reshape(len(windows_WwLE), parts, length, *windows_WwLE.shape[2:])
    return means.mean(axis=2).var(axis=1, ddof=1) / parts
