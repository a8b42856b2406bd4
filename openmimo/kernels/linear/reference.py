"""The definition: torch's linear, once per weight. Quantized weights are dequantized; packed ones get int8 inputs."""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import WeightAndBias
from openmimo.kernels.weights import BlockScaled, Packed, int8_input


def run(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`."""
    outputs = []
    for weight_OD, bias_O in layers:
        if isinstance(weight_OD, Packed):
            levels = int8_input(x, weight_OD.packing.input_halves)
            outputs.append(F.linear(levels, weight_OD.dequantize(x.dtype), bias_O))
        else:
            plain = weight_OD.dequantize(x.dtype) if isinstance(weight_OD, BlockScaled) else weight_OD
            outputs.append(F.linear(x, plain, bias_O))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
