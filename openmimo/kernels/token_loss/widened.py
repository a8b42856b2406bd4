"""Bfloat16 on a CPU without bfloat16 instructions: the same call on float32 copies of hidden and weight.

T tokens, D model dim, V vocabulary.
"""

import torch

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import TOKEN_LOSS, TokenLossFunctions, TokenLossNeed
from openmimo.runtime.device import cpu_multiplies_bfloat16


def logprobs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_logprobs`."""
    return _float32_functions().logprobs(hidden_TD.float(), weight_VD.float(), labels_T, temperature)


def loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_loss`."""
    return _float32_functions().loss(hidden_TD.float(), weight_VD.float(), labels_T, weights_T)


def argmax(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.token_argmax`."""
    return _float32_functions().argmax(hidden_TD.float(), weight_VD.float())


def _float32_functions() -> TokenLossFunctions:
    return TOKEN_LOSS.best(TokenLossNeed(torch.float32, True))[1].run


def refuse(need: TokenLossNeed) -> str | None:
    """Refuse all but bfloat16 on a CPU without instructions for it."""
    if not need.on_cpu:
        return "it runs on CPUs only"
    if need.dtype != torch.bfloat16:
        return f"it computes bfloat16 only, not {need.dtype}"
    if cpu_multiplies_bfloat16():
        return "this CPU multiplies bfloat16 itself"
    return None


PLUGIN = Backend(priority=50, run=TokenLossFunctions(logprobs, loss, argmax), refuse=refuse)
