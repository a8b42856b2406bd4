"""RLOO: unbiased REINFORCE with the mean reward of the other responses as baseline (2402.14740)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from openmimo.core.samples import Sample
from openmimo.rl.algorithm import Algorithm, PolicyOptions
from openmimo.rl.algorithms._correction import corrected_for_policy
from openmimo.rl.learning.annotation import annotate_outcomes
from openmimo.rl.losses import objectives
from openmimo.rl.losses.advantages import rloo_advantages
from openmimo.rl.losses.tokens import TokenBatch


@dataclass(frozen=True)
class Options(PolicyOptions):
    """Options of RLOO.

    Attributes:
        normalization: "constant" gives the gradient of the expected reward; the others weight by length.
    """

    normalization: Literal["token", "sequence", "constant"] = "constant"


def annotate(samples: list[Sample], options: Options, policy_logprobs: Sequence[Sequence[float]]) -> None:
    """Group advantages: reward - mean reward of the others."""
    annotate_outcomes(samples, options, rloo_advantages)


def token_losses(batch: TokenBatch, options: Options) -> torch.Tensor:
    """-A log π_θ, [N], times the correction by π_θ / μ, which also covers several updates on the same samples."""
    return corrected_for_policy(objectives.reinforce(batch), batch, options.correction)


PLUGIN = Algorithm(
    describe="REINFORCE with the mean of the other responses as baseline, unbiased",
    options=Options,
    annotate=annotate,
    token_losses=token_losses,
)
