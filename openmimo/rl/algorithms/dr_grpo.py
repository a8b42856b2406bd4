"""Dr. GRPO: no division by the group std or the response length (2503.20783)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from openmimo.core.fields import Fraction, NonNegativeFloat
from openmimo.core.samples import Sample
from openmimo.rl.algorithm import Algorithm, RatioOptions
from openmimo.rl.algorithms._correction import corrected_for_engine
from openmimo.rl.learning.annotation import annotate_outcomes
from openmimo.rl.losses import objectives
from openmimo.rl.losses.advantages import dr_grpo_advantages
from openmimo.rl.losses.tokens import TokenBatch


@dataclass(frozen=True)
class Options(RatioOptions):
    """Options of Dr. GRPO.

    Attributes:
        normalization: Weights of tokens, see `losses/normalize.py`.
        low: The policy ratio is clipped below at 1 - low.
        high: The policy ratio is clipped above at 1 + high.
    """

    normalization: Literal["token", "sequence", "constant"] = "constant"
    low: Fraction = 0.2
    high: NonNegativeFloat = 0.2


def annotate(samples: list[Sample], options: Options, policy_logprobs: Sequence[Sequence[float]]) -> None:
    """Group advantages: reward - mean."""
    annotate_outcomes(samples, options, dr_grpo_advantages)


def token_losses(batch: TokenBatch, options: Options) -> torch.Tensor:
    """The clipped loss, [N]."""
    losses_N = objectives.clipped(batch, low=options.low, high=options.high, old_policy=options.old_policy)
    return corrected_for_engine(losses_N, batch, options)


PLUGIN = Algorithm(
    describe="Dr. GRPO: no std, and a constant denominator",
    options=Options,
    annotate=annotate,
    token_losses=token_losses,
)
