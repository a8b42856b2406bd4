"""What `openmimo experts` computes, without torch and NumPy."""

from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.core.fields import NonNegativeInt, PositiveFloat, PositiveInt, check_fields


@dataclass(frozen=True)
class DetectorConfig:
    """Limits of the stable state.

    Attributes:
        window_steps: Steps of a window.
        max_dispersion: Largest dispersion of a stable window. Tokens of one text choose alike, which raises it for
            good, so that it must be set from the end of a long run.
        max_shift: Largest shift of a stable window.
        span_windows: Windows over which the shares must not have changed.
    """

    window_steps: PositiveInt = 100
    max_dispersion: PositiveFloat = 6.0
    max_shift: PositiveFloat = 6.0
    span_windows: PositiveInt = 3

    def __post_init__(self) -> None:
        check_fields(self, "detector")
        if self.window_steps < 2:
            raise ConfigError("detector.window_steps is 1; a variance needs at least 2 steps.")


@dataclass(frozen=True)
class ExpertsConfig:
    """Forecasts, devices and detector of the page.

    Attributes:
        horizon: Steps to forecast (None: a third of the trace, at most 1,000).
        predictors: Names of the predictors to compare. The first one makes the proposal.
        num_origins: Horizons inside the trace on which the predictors are compared.
        devices: Devices for the experts of a layer.
        spare_slots: Slots for replicas on each device.
        nodes: Nodes that the devices belong to.
        groups: Groups of experts that stay on one node.
        detector: The limits of the state of a layer.
    """

    horizon: PositiveInt | None = None
    predictors: tuple[str, ...] = ("window_average", "last_value", "exponential_average")
    num_origins: PositiveInt = 3
    devices: PositiveInt = 4
    spare_slots: NonNegativeInt = 1
    nodes: PositiveInt = 1
    groups: PositiveInt = 1
    detector: DetectorConfig = DetectorConfig()

    def __post_init__(self) -> None:
        check_fields(self, "experts")
        if not self.predictors:
            raise ConfigError("experts needs at least one predictor; name one with --predictors.")
