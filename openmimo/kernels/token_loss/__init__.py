"""Log-probabilities and losses of tokens, computed from hidden states without keeping logits.

The softmax computes in float32, or float64 for float64 inputs.

T tokens, D model dim, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher

DISPATCHER = Dispatcher("openmimo.kernels.token_loss", "OPENMIMO_TOKEN_LOSS")
IGNORED_LABEL = -1


class TokenLossNeed(NamedTuple):
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        dtype: Dtype of hidden and weight.
        on_cpu: Whether they are in CPU memory.
    """

    dtype: torch.dtype
    on_cpu: bool


@dataclass(frozen=True)
class TokenLossFunctions:
    """The functions of one backend.

    Attributes:
        logprobs: hidden [T, D], weight [V, D], labels [T], temperature: see `token_logprobs`.
        loss: hidden [T, D], weight [V, D], labels [T], weights [T]: see `token_loss`; every row counts.
        argmax: hidden [T, D], weight [V, D]: see `token_argmax`.
    """

    logprobs: Callable[..., torch.Tensor]
    loss: Callable[..., torch.Tensor]
    argmax: Callable[..., torch.Tensor]


def token_logprobs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, *, temperature: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """log p(label) under softmax(hidden @ weight.T / temperature): [T] float32, or float64 for float64 inputs.

    Differentiable in hidden and weight.

    Args:
        hidden_TD: Final hidden states.
        weight_VD: Weight of the output head.
        labels_T: Integer token ids. A label of -1 is ignored: the result is 0 and has no gradient.
        temperature: One number or [T]. It divides the logits in the dtype of the result, as in the engine's sampler.
    """
    return _functions(hidden_TD).logprobs(hidden_TD, weight_VD, labels_T, temperature)


def token_loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """-sum over tokens of weights_T * log p(label): a float32 scalar, or float64 for float64 inputs.

    Labels as in `token_logprobs`. Rows with label -1 or weight 0 are dropped before any arithmetic. Differentiable in
    hidden and weight, not in `weights_T`.
    """
    kept = torch.nonzero((labels_T != IGNORED_LABEL) & (weights_T != 0)).squeeze(1)
    if len(kept) < len(labels_T):
        hidden_TD, labels_T, weights_T = hidden_TD[kept], labels_T[kept], weights_T[kept]
    return _functions(hidden_TD).loss(hidden_TD, weight_VD, labels_T, weights_T.detach())


def token_argmax(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """The most probable token of each row, LongTensor [T]. Not differentiable."""
    return _functions(hidden_TD).argmax(hidden_TD.detach(), weight_VD.detach())


def _functions(hidden_TD: torch.Tensor) -> TokenLossFunctions:
    return DISPATCHER.choose(TokenLossNeed(hidden_TD.dtype, hidden_TD.is_cpu))[1].run
