"""Conversion of samples to tensors over policy-written tokens, and of results to annotations of the samples.

N policy-written tokens of the learnable samples of a step, B learnable samples, E episodes of these samples.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from openmimo.core.samples import Sample
from openmimo.rl.algorithm import PolicyOptions
from openmimo.rl.losses import normalize


def is_learnable(sample: Sample) -> bool:
    """Whether the policy can learn from a sample: no infrastructure failure, and at least one policy-written token."""
    return sample.finish_reason != "error" and sample.num_answer_tokens > 0


def numbers_of(names: Sequence[str]) -> torch.Tensor:
    """A number for each name, int64: equal names have equal numbers, which count from 0."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)


def lengths_of(samples: list[Sample]) -> torch.Tensor:
    """Policy-written tokens of each sample, int64 [B]."""
    return torch.tensor([sample.num_answer_tokens for sample in samples], dtype=torch.int64)


def episode_lengths(samples: list[Sample]) -> torch.Tensor:
    """Policy-written tokens of each episode, int64 [E]. The contexts of an episode must be adjacent."""
    lengths: list[int] = []
    before = ""
    for sample in samples:
        if sample.episode and sample.episode == before:
            lengths[-1] += sample.num_answer_tokens
        else:
            lengths.append(sample.num_answer_tokens)
        before = sample.episode
    return torch.tensor(lengths, dtype=torch.int64)


def written_values(samples: list[Sample], values: Sequence[Sequence[float] | np.ndarray], *, what: str) -> torch.Tensor:
    """The entries of policy-written tokens in per-token values of each sample, float64 [N].

    Raises:
        ValueError: The values of a sample are not aligned with its tokens.
    """
    written = [np.zeros(0)]
    for index, (sample, token_values) in enumerate(zip(samples, values, strict=True)):
        if not len(token_values) == len(sample.loss_mask) == len(sample):
            raise ValueError(
                f"Sample {index} of group {sample.group!r} has {len(sample)} tokens, a loss mask of "
                f"{len(sample.loss_mask)} and {len(token_values)} {what}; entry i of each must belong to token i."
            )
        written.append(np.asarray(token_values, np.float64)[sample.loss_mask])
    return torch.from_numpy(np.concatenate(written))


def outcome_advantages(
    samples: list[Sample], advantages_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The advantage of each sample, float64 [B]. An episode counts once in its group, even with several contexts.

    Args:
        samples: Learnable samples.
        advantages_of: Computes advantages from rewards, float64 [E], and group numbers, int64 [E].

    Raises:
        ValueError: A sample has no finite reward.
    """
    rewards_B = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    if not rewards_B.isfinite().all():
        index = int((~rewards_B.isfinite()).nonzero()[0])
        raise ValueError(
            f"A sample of group {samples[index].group!r} has reward {samples[index].reward}. Score every sample, or "
            "set its finish_reason to 'error' if it cannot be scored."
        )
    if not samples:
        return rewards_B
    episodes = [sample.episode or f"sample {index}" for index, sample in enumerate(samples)]
    last_contexts = list({name: index for index, name in enumerate(episodes)}.values())
    groups_E = numbers_of([samples[index].group for index in last_contexts])
    return advantages_of(rewards_B[last_contexts], groups_E)[numbers_of(episodes)]


def write_annotations(samples: list[Sample], advantages_N: torch.Tensor, weights_N: torch.Tensor) -> None:
    """Set `advantages` and `weights` of all samples; 0 outside the loss mask and in samples that are not learnable."""
    start = 0
    for sample in samples:
        stop = start + (sample.num_answer_tokens if is_learnable(sample) else 0)
        sample.advantages = spread(sample, advantages_N[start:stop])
        sample.weights = spread(sample, weights_N[start:stop])
        start = stop


def spread(sample: Sample, values_N: torch.Tensor) -> np.ndarray:
    """Per-token values of a sample, float64 [T], from those of its policy-written tokens (N or none); 0.0 elsewhere."""
    values = np.zeros(len(sample))
    if len(values_N):
        values[sample.loss_mask] = values_N.double().cpu().numpy()
    return values


def annotate_outcomes(
    samples: list[Sample],
    options: PolicyOptions,
    advantages_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Annotate all tokens of a sample with its advantage, and with weights by the normalization of the options."""
    learnable = [sample for sample in samples if is_learnable(sample)]
    lengths_B = lengths_of(learnable)
    advantages_B = outcome_advantages(learnable, advantages_of)
    weights_N = _weights(episode_lengths(learnable), options)
    write_annotations(samples, advantages_B.repeat_interleave(lengths_B), weights_N)


def _weights(lengths_E: torch.Tensor, options: PolicyOptions) -> torch.Tensor:
    match options.normalization:
        case "token":
            return normalize.token_weights(lengths_E)
        case "sequence":
            return normalize.sequence_weights(lengths_E)
        case "constant":
            max_length = options.max_answer_tokens or max(lengths_E.tolist(), default=1)
            return normalize.constant_weights(lengths_E, max_length=max_length)
