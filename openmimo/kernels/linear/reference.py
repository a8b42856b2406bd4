"""The definition: torch's linear, once per weight. Quantized weights are dequantized; packed ones get int8 inputs."""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import WeightAndBias
from openmimo.kernels.weights import product_input


def run(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`."""
    outputs = [
        F.linear(
            product_input(x, weight_OD),
            weight_OD if isinstance(weight_OD, torch.Tensor) else weight_OD.dequantize(x.dtype),
            bias_O,
        )
        for weight_OD, bias_O in layers
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
