"""The input of a policy loss: the policy-written tokens of a micro-batch with their per-token numbers.

N policy-written tokens of a micro-batch, B sequences of it.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenBatch:
    """The policy-written tokens of whole sequences, without prompts and tool responses.

    A sequence is never split over batches, because sequence ratios (GSPO) and sequence gates need all of its tokens.

    Attributes:
        logprobs_N: log π_θ, by the trainer, with gradient.
        old_logprobs_N: log π_old, by the trainer before the first update of the step.
        behavior_logprobs_N: log μ, by the engine that sampled the token.
        advantages_N: The advantage of each token.
        sequence_N: int64, 0 to B - 1, the sequence of each token.
        staleness_N: int64, the current policy version minus the one that sampled the token.
        num_sequences: B.

    Raises:
        ValueError: The tensors differ in length.
    """

    logprobs_N: torch.Tensor
    old_logprobs_N: torch.Tensor
    behavior_logprobs_N: torch.Tensor
    advantages_N: torch.Tensor
    sequence_N: torch.Tensor
    staleness_N: torch.Tensor
    num_sequences: int

    def __post_init__(self) -> None:
        shape = self.logprobs_N.shape
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        wrong = {name: tuple(value.shape) for name, value in tensors.items() if value.shape != shape}
        if len(shape) != 1 or wrong:
            raise ValueError(
                f"The tensors of a token batch must all be [N]; logprobs_N is {tuple(shape)}, but {wrong}."
            )

    def sequence_sum(self, values_N: torch.Tensor) -> torch.Tensor:
        """The sum of each sequence's values: [N] to [B]."""
        return values_N.new_zeros(self.num_sequences).index_add(0, self.sequence_N, values_N)

    def sequence_mean(self, values_N: torch.Tensor) -> torch.Tensor:
        """The mean of each sequence's values: [N] to [B]. A sequence without tokens gives 0."""
        return self.sequence_sum(values_N) / self.sequence_sum(torch.ones_like(values_N)).clamp(min=1)

    def per_token(self, values_B: torch.Tensor) -> torch.Tensor:
        """The sequence value for each token: [B] to [N]."""
        return values_B[self.sequence_N]
