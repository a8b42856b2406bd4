"""The check of rewards: numbers from 0 to 1. Any other value ends the run."""

import math
import numbers
from typing import Any

import numpy as np
import torch

from openmimo.core.errors import UserError
from openmimo.rl.scheduling.groups import GroupRequest

ROUNDING = 1e-6


class RewardError(UserError):
    """The reward of an environment is no number from 0 to 1."""


def checked_reward(value: Any, request: GroupRequest) -> float:
    """The reward as a float from 0 to 1. Values that are outside by up to ROUNDING are clamped.

    Args:
        value: A bool, an int, a float, or a scalar of NumPy or torch.
        request: The request of the sample, for the message.

    Raises:
        RewardError: The value is no number, not finite, or outside 0 to 1.
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
