"""The definition, with the gradients of autograd: all logits at once, T x V memory.

T tokens, D model dim, V vocabulary.
"""

import torch

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import IGNORED_LABEL, TokenLossFunctions


def logprobs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_logprobs`."""
    logits_TV = hidden_TD @ weight_VD.T
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    logits_TV = logits_TV / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    label_T1 = labels_T.clamp(min=0)[:, None]
    logprobs_T = logits_TV.log_softmax(dim=-1).gather(1, label_T1).squeeze(1)
    return logprobs_T.masked_fill(labels_T == IGNORED_LABEL, 0.0)


def loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_loss`."""
    logprobs_T = logprobs(hidden_TD, weight_VD, labels_T, 1.0)
    return -(weights_T.to(logprobs_T.dtype) * logprobs_T).sum()


def argmax(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_argmax`."""
    return (hidden_TD @ weight_VD.T).argmax(dim=-1)


PLUGIN = Backend(priority=0, run=TokenLossFunctions(logprobs, loss, argmax), refuse=lambda need: None)
