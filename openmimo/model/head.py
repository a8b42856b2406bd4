"""The output head: maps states to logits, or to log-probabilities and losses without a [T, vocabulary] tensor.

All code that needs the head's weight calls the module, so that hooks, parametrizations and sharded weights take effect.

T packed tokens, D model dim, V vocabulary.
"""

import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

from openmimo.kernels.token_loss import token_argmax, token_logprobs, token_loss
from openmimo.kernels.weights import BlockScaled
from openmimo.model.layers import Embedding, Linear

Reader = Callable[[torch.Tensor, torch.Tensor], Any]


class Head(Linear):
    """Linear layer from states to the vocabulary. Its weight is always plain."""

    quantizable = MappingProxyType({})

    def __init__(self, model_dim: int, vocab_size: int):
        super().__init__(model_dim, vocab_size, bias=False)

    def forward(self, states_TD: torch.Tensor, reader: Reader | None = None) -> Any:
        """Logits [T, V] in float32 (float64 for float64 states), or the result of `reader`.

        Args:
            states_TD: Final hidden states.
            reader: Called with the states and the weight in their dtype, instead of computing logits.
        """
        if reader is not None:
            weight_VD = self.weight_as("weight", states_TD.dtype)
            assert not isinstance(weight_VD, BlockScaled)
            return reader(states_TD, weight_VD)
        logits_TV = super().forward(states_TD)
        return logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()

    def logprobs(
        self, states_TD: torch.Tensor, labels_T: torch.Tensor, temperature: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        """log p(label) at a temperature, [T], float32 or float64; see `kernels.token_loss.token_logprobs`."""
        return self(states_TD, functools.partial(_logprobs, labels_T=labels_T, temperature=temperature))

    def loss(self, states_TD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
        """-sum of weights_T * log p(label), a scalar; see `kernels.token_loss.token_loss`."""
        return self(states_TD, functools.partial(token_loss, labels_T=labels_T, weights_T=weights_T))

    def argmax(self, states_TD: torch.Tensor) -> torch.Tensor:
        """The most probable token of each row, int64 [T]."""
        return self(states_TD, token_argmax)

    def tie(self, embedding: Embedding) -> None:
        """Share the embedding's weight."""
        self.weight = embedding.weight


def _logprobs(
    states_TD: torch.Tensor, weight_VD: torch.Tensor, *, labels_T: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    return token_logprobs(states_TD, weight_VD, labels_T, temperature=temperature)
