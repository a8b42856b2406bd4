"""An optimizer step that treats the experts of a layer singly: gradient clipping, learning rate, idle experts.

The weights of all experts of a layer are one parameter [E, ...], which Adam updates as a whole. This file corrects the
rows of single experts before and after that update, so it needs a copy of the experts' weights during the step.
Which of the settings help is measured in docs/experts.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from openmimo.model.mimo import MiMo
from openmimo.model.moe import MoE
from openmimo.train.config import ExpertStepConfig

LARGEST_RATE = 4.0  # times the learning rate of the step


@dataclass(frozen=True)
class _Before:
    """A parameter and its moments before a step."""

    parameter: nn.Parameter
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]


class ExpertStep:
    """Takes the optimizer steps of a model.

    Args:
        model: A model with experts, whole on one device.
        config: The settings.
    """

    def __init__(self, model: MiMo, config: ExpertStepConfig):
        self._config = config
        self._experts = {
            layer.index: [parameter for parameter in cast(MoE, layer.mlp).experts.parameters()]
            for layer in model.model.layers
            if layer.is_sparse
        }

    @torch.no_grad()
    def clip(self) -> None:
        """Scale the gradients of each expert so that their norm is at most `clip_norm`.

        A gradient that is not finite is unchanged. The clipping of all gradients together follows.
        """
        if not self._config.clip_norm:
            return
        for parameters in self._experts.values():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm_E = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
            scale_E = torch.where(norm_E.isfinite(), self._config.clip_norm / (norm_E + 1e-6), 1.0).clamp(max=1.0)
            for gradient in gradients:
                gradient *= _by_row(scale_E, gradient)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, load: dict[int, torch.Tensor]) -> None:
        """Take a step.

        Args:
            optimizer: The optimizer of the model.
            load: Visits of each expert in this step, int64 [E], by layer.
        """
        if not (self._config.rate_exponent or self._config.keep_idle):
            optimizer.step()
            return
        before = {layer: self._copies(parameters, optimizer) for layer, parameters in self._experts.items()}
        optimizer.step()
        for layer, copies in before.items():
            load_E = load[layer].float()
            rate_E = (load_E / load_E.mean()).pow(self._config.rate_exponent).clamp(max=LARGEST_RATE)
            idle_E = (load_E == 0) if self._config.keep_idle else torch.zeros_like(load_E, dtype=torch.bool)
            for copy in copies:
                rate = _by_row(rate_E.masked_fill(idle_E, 0.0), copy.weight)
                copy.parameter.copy_(torch.lerp(copy.weight, copy.parameter, rate.to(copy.weight.dtype)))
                for name, moment in copy.moments.items():
                    optimizer.state[copy.parameter][name][idle_E] = moment[idle_E]

    def _copies(self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[_Before]:
        copies = []
        for parameter in parameters:
            state = optimizer.state.get(parameter, {})
            names = ("exp_avg", "exp_avg_sq") if self._config.keep_idle else ()
            moments = {name: state[name].clone() if state else torch.zeros_like(parameter) for name in names}
            copies.append(_Before(parameter, parameter.detach().clone(), moments))
        return copies


def _by_row(values_E: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return [E, 1, ...] with the number of dimensions of `like`."""
    return values_E.view(-1, *[1] * (like.ndim - 1))
