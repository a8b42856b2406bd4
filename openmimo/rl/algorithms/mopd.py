"""MOPD, multi-teacher on-policy distillation: the domain's teacher rewards each token (2601.02780, section 4.4).

N policy-written tokens, B samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openmimo.core.fields import NonNegativeFloat, PositiveFloat, check_fields
from openmimo.core.samples import Sample
from openmimo.rl.algorithm import Algorithm, Correction
from openmimo.rl.algorithms._correction import corrected_for_policy
from openmimo.rl.learning.annotation import (
    episode_lengths,
    is_learnable,
    lengths_of,
    numbers_of,
    outcome_advantages,
    write_annotations,
    written_values,
)
from openmimo.rl.losses import normalize, objectives
from openmimo.rl.losses.advantages import grpo_advantages, mopd_advantages, teacher_advantages
from openmimo.rl.losses.tokens import TokenBatch


@dataclass(frozen=True)
class Options:
    """Options of MOPD. The paper reports none of these values.

    Attributes:
        correction: The gate of equation 8. 0.5 to 2 suits an engine with the trainer's code, 0.5 to 5 another engine.
        advantage_limit: The teacher's advantages are clipped to ± this value, in nats.
        alpha: Weight of the outcome advantage (GRPO) relative to the teacher's, equation 9. 0 needs no rewards.
        balance_domains: Give every domain equal weight in a step, independent of the number and length of responses.
        scale_domains: Scale the teachers' advantages to a similar spread in all domains, by at most 4 (DN-MOPD).
    """

    correction: Correction = Correction("icepop", low=0.5, high=2.0)
    advantage_limit: PositiveFloat = 5.0
    alpha: NonNegativeFloat = 0.0
    balance_domains: bool = True
    scale_domains: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "algorithm_options")


def annotate(samples: list[Sample], options: Options, policy_logprobs: Sequence[Sequence[float]]) -> None:
    """Advantages of equations 8 and 9, weights of equation 7: 1 / (B |y|), then balanced over domains.

    Equation 8 uses the current policy: with several updates on the same samples, annotate again before each update.
    """
    pairs = [pair for pair in zip(samples, policy_logprobs, strict=True) if is_learnable(pair[0])]
    learnable = [sample for sample, _ in pairs]
    policy_N = written_values(learnable, [own for _, own in pairs], what="policy log-probabilities")
    teacher_N = written_values(
        learnable, [sample.teacher_logprobs for sample in learnable], what="teacher log-probabilities (NaN: not given)"
    )
    lengths_B = lengths_of(learnable)
    domains_B = numbers_of([sample.domain for sample in learnable])
    advantages_N = teacher_advantages(teacher_N, policy_N, limit=options.advantage_limit)
    if options.scale_domains:
        advantages_N = advantages_N * normalize.domain_scales(
            teacher_N - policy_N, domains_B.repeat_interleave(lengths_B)
        )
    if options.alpha > 0:
        outcome_N = outcome_advantages(learnable, grpo_advantages).repeat_interleave(lengths_B)
        advantages_N = mopd_advantages(advantages_N, outcome_N, alpha=options.alpha)
    weights_N = normalize.sequence_weights(episode_lengths(learnable))
    if options.balance_domains:
        weights_N = normalize.balance_domains(weights_N, lengths_B, domains_B)
    write_annotations(samples, advantages_N, weights_N)


def token_losses(batch: TokenBatch, options: Options) -> torch.Tensor:
    """-w A log π_θ, [N] (equation 7), with w = π_θ / μ inside the gate and 0 outside."""
    return corrected_for_policy(objectives.reinforce(batch), batch, options.correction)


PLUGIN = Algorithm(
    describe="MOPD: on-policy distillation from one teacher per domain, with optional outcome rewards",
    options=Options,
    annotate=annotate,
    token_losses=token_losses,
    uses_teacher=True,
)
