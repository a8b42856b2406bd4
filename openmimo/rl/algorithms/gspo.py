"""GSPO: policy ratio, clipping and averaging by whole sequences (2507.18071)."""

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
from openmimo.rl.losses.advantages import grpo_advantages
from openmimo.rl.losses.tokens import TokenBatch


@dataclass(frozen=True)
class Options(RatioOptions):
    """Options of GSPO. The ratio of a sequence is the geometric mean of its token ratios, which is much closer to 1.

    Attributes:
        normalization: Weights of tokens, see `losses/normalize.py`.
        low: The sequence ratio is clipped below at 1 - low.
        high: The sequence ratio is clipped above at 1 + high.
    """

    normalization: Literal["token", "sequence", "constant"] = "sequence"
    low: Fraction = 3e-4
    high: NonNegativeFloat = 4e-4


def annotate(samples: list[Sample], options: Options, policy_logprobs: Sequence[Sequence[float]]) -> None:
    """Group advantages: (reward - mean) / std."""
    annotate_outcomes(samples, options, grpo_advantages)


def token_losses(batch: TokenBatch, options: Options) -> torch.Tensor:
    """The loss clipped by sequence, [N]."""
    losses_N = objectives.gspo(batch, low=options.low, high=options.high, old_policy=options.old_policy)
    return corrected_for_engine(losses_N, batch, options)


PLUGIN = Algorithm(
    describe="GSPO: clips the ratio of whole sequences",
    options=Options,
    annotate=annotate,
    token_losses=token_losses,
)
