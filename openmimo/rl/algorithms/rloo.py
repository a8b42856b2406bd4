"""RLOO: REINFORCE against the mean reward of the other answers, which leaves it unbiased (2402.14740)."""

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
    """A constant denominator keeps the gradient that of the expected reward; other normalizations weigh by length."""

    normalization: Literal["token", "sequence", "constant"] = "constant"


def annotate(samples: list[Sample], options: Options, policy_logprobs: Sequence[Sequence[float]]) -> None:
    """reward - mean reward of the others in the group."""
    annotate_outcomes(samples, options, rloo_advantages)


def token_losses(batch: TokenBatch, options: Options) -> torch.Tensor:
    """-A log π_θ, [N], times the correction by π_θ / μ, which also covers several updates on the same samples."""
    return corrected_for_policy(objectives.reinforce(batch), batch, options.correction)


PLUGIN = Algorithm(
    describe="REINFORCE against the mean of the other answers, unbiased",
    options=Options,
    annotate=annotate,
    token_losses=token_losses,
)
