"""GRPO as in MiMo-7B: equal token weights, clip-higher, no KL term (2505.07608, section 3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch

from openmimo.core.fields import Bounds, Fraction, NonNegativeFloat, PositiveFloat
from openmimo.core.samples import Sample
from openmimo.rl.algorithm import Algorithm, RatioOptions
from openmimo.rl.algorithms._correction import corrected_for_engine
from openmimo.rl.learning.annotation import annotate_outcomes
from openmimo.rl.losses import objectives
from openmimo.rl.losses.advantages import grpo_advantages
from openmimo.rl.losses.tokens import TokenBatch

AboveOne = Annotated[float, Bounds(above=1)]


@dataclass(frozen=True)
class Options(RatioOptions):
    """Options of GRPO.

    Attributes:
        low: The policy ratio is clipped below at 1 - low.
        high: The policy ratio is clipped above at 1 + high.
        dual_clip: Maximum loss of a token with negative advantage, as a multiple of it (above 1; None: no limit).
        epsilon: Added to the std of a group's rewards.
    """

    low: Fraction = 0.2
    high: NonNegativeFloat = 0.28
    dual_clip: AboveOne | None = None
    epsilon: PositiveFloat = 1e-6


def annotate(samples: list[Sample], options: Options, policy_logprobs: Sequence[Sequence[float]]) -> None:
    """Group advantages: (reward - mean) / std."""
    annotate_outcomes(samples, options, partial(grpo_advantages, epsilon=options.epsilon))


def token_losses(batch: TokenBatch, options: Options) -> torch.Tensor:
    """The clipped loss, [N]."""
    dual = math.inf if options.dual_clip is None else options.dual_clip
    losses_N = objectives.clipped(batch, low=options.low, high=options.high, dual=dual, old_policy=options.old_policy)
    return corrected_for_engine(losses_N, batch, options)


PLUGIN = Algorithm(
    describe="GRPO with clip-higher, averaged over tokens, no KL term (MiMo-7B)",
    options=Options,
    annotate=annotate,
    token_losses=token_losses,
)
