"""The optimizer and its parameter groups, gradient clipping, and the counts that the report watches."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from openmimo.model.mimo import MiMo
from openmimo.train.config import OptimizerConfig


def build_optimizer(model: MiMo, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices (embedding, projections, experts, router), none on norms, sinks and biases."""
    decayed, free = parameter_groups(model)
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(free.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def parameter_groups(model: MiMo) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters by name: those with weight decay, and those without."""
    decayed: dict[str, nn.Parameter] = {}
    free: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 else free)[name] = parameter
    return decayed, free


@dataclass(frozen=True)
class GradientReport:
    """What the gradients of a step were, before clipping; tensors without dimensions, on the device.

    Attributes:
        norm: Of all gradients together, but for those apart.
        num_zeros: Their entries that are exactly zero.
        apart_norm: Of the gradients apart.
    """

    norm: torch.Tensor
    num_zeros: torch.Tensor
    apart_norm: torch.Tensor


def clip_gradients(model: MiMo, max_norm: float, *, apart: Iterable[nn.Parameter] = ()) -> GradientReport:
    """Scales all gradients so that their common norm is at most `max_norm`; reports what they were.

    Gradients whose norm is not finite are left as they are. The accelerator is not waited for.

    Args:
        model: Its gradients are changed.
        max_norm: Above 0.
        apart: Parameters with a norm of their own, so that neither scales the other.
    """
    apart = list(apart)
    ids = {id(parameter) for parameter in apart}
    common = [parameter for parameter in model.parameters() if parameter.grad is not None and id(parameter) not in ids]
    num_zeros = torch.zeros((), dtype=torch.int64, device=model.device)
    for gradient in gradients_of(common):
        num_zeros += gradient.numel() - torch.count_nonzero(gradient)
    norm = _clip(common, max_norm, model.device)
    apart_norm = _clip([own for own in apart if own.grad is not None], max_norm, model.device)
    return GradientReport(norm, num_zeros, apart_norm)


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """The gradients of those parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _clip(parameters: list[nn.Parameter], max_norm: float, device: torch.device) -> torch.Tensor:
    if not parameters:
        return torch.zeros((), device=device)
    norm = torch.nn.utils.get_total_norm(gradients_of(parameters))
    # A norm of 0 scales by 1. NaN would spread to every gradient, and hide which one it came from.
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.where(norm.isfinite(), norm, 0.0))
    return norm
