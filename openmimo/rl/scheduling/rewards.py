"""What a reward is: a number from 0 to 1. Any other value that an environment gives ends the run."""

import math
import numbers
from typing import Any

import numpy as np
import torch

from openmimo.core.errors import UserError
from openmimo.rl.scheduling.groups import GroupRequest

ROUNDING = 1e-6


class RewardError(UserError):
    """An environment gave a reward that is none."""


def checked_reward(value: Any, request: GroupRequest) -> float:
    """The reward as a float from 0 to 1; what is outside by no more than rounding is moved inside.

    Booleans and numbers of NumPy and torch are numbers. Raises RewardError, with the environment, the problem and the
    value, for NaN, infinity, anything outside 0 to 1, and what is no number.
    """
    if isinstance(value, np.bool_) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    is_number = isinstance(value, numbers.Real)
    if is_number and math.isfinite(value) and -ROUNDING <= value <= 1 + ROUNDING:
        return min(1.0, max(0.0, float(value)))
    raise RewardError(
        f"environment {request.environment!r} (source {request.source!r}) gave problem {request.problem.id!r} the "
        f"reward {value!r}{'' if is_number else f', a {type(value).__name__}'}; a reward is a number from 0 to 1. "
        "Correct the environment's reward()."
    )
