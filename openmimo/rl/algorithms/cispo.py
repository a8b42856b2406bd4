"""CISPO: the ratio is a clipped weight, so every token keeps its gradient (MiniMax-M1, 2506.13585)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openmimo.core.errors import ConfigError
from openmimo.core.fields import NonNegativeFloat
from openmimo.core.samples import Sample
from openmimo.rl.algorithm import Algorithm, RatioOptions
from openmimo.rl.algorithms._correction import corrected_for_engine
from openmimo.rl.learning.annotation import annotate_outcomes
from openmimo.rl.losses import objectives
from openmimo.rl.losses.advantages import grpo_advantages
from openmimo.rl.losses.tokens import TokenBatch


@dataclass(frozen=True)
class Options(RatioOptions):
    """Options of CISPO. The paper uses only the upper bound and does not report its value.

    Attributes:
        low_ratio: Lower bound of a token's weight.
        high_ratio: Upper bound of a token's weight.
    """

    low_ratio: NonNegativeFloat = 0.0
    high_ratio: NonNegativeFloat = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low_ratio < self.high_ratio:
            raise ConfigError(f"low_ratio {self.low_ratio} and high_ratio {self.high_ratio} must be 0 <= low < high.")


def annotate(samples: list[Sample], options: Options, policy_logprobs: Sequence[Sequence[float]]) -> None:
    """Group advantages: (reward - mean) / std."""
    annotate_outcomes(samples, options, grpo_advantages)


def token_losses(batch: TokenBatch, options: Options) -> torch.Tensor:
    """The weighted REINFORCE loss, [N]."""
    losses_N = objectives.cispo(
        batch, low_ratio=options.low_ratio, high_ratio=options.high_ratio, old_policy=options.old_policy
    )
    return corrected_for_engine(losses_N, batch, options)


PLUGIN = Algorithm(
    describe="CISPO: clips a token's weight, never its gradient",
    options=Options,
    annotate=annotate,
    token_losses=token_losses,
)
