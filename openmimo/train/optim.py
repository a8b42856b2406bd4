"""The optimiser and its parameter groups, gradient clipping, and the counts that the report watches."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from openmimo.model.mimo import MiMo
from openmimo.train.config import OptimiserConfig


def build_optimiser(model: MiMo, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices (embedding, projections, experts, router), none on norms, sinks and biases."""
    decayed, free = parameter_groups(model)
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(free.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def parameter_groups(model: MiMo) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters by name: those with weight decay, and those without."""
    decayed, free = {}, {}
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 else free)[name] = parameter
    return decayed, free


@dataclass(frozen=True)
class GradientReport:
    """norm: of all gradients together, before clipping. num_zeros: gradient entries that are exactly zero."""

    norm: float
    num_zeros: int


def clip_gradients(model: MiMo, max_norm: float, *, apart: Iterable[nn.Parameter] = ()) -> GradientReport:
    """Scales all gradients so that their common norm is at most `max_norm`; reports what they were.

    apart: parameters that have a norm of their own, which is not reported, so that neither scales the other.
    """
    apart = list(apart)
    ids = {id(parameter) for parameter in apart}
    common = [parameter for parameter in model.parameters() if parameter.grad is not None and id(parameter) not in ids]
    num_nonzero = sum(torch.count_nonzero(own.grad) for own in common)  # a tensor: an accelerator is asked only once
    num_zeros = sum(own.grad.numel() for own in common) - int(num_nonzero)
    norm = float(torch.nn.utils.clip_grad_norm_(common, max_norm))
    if apart:
        torch.nn.utils.clip_grad_norm_(apart, max_norm)
    return GradientReport(norm, num_zeros)
