"""The definition: torch's linear, once per weight. Quantized weights are dequantized; packed ones get int8 inputs."""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import WeightAndBias
from openmimo.kernels.weights import product_input


def run(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`."""
    if len(layers) > 1 and not x.is_cpu and not torch.is_grad_enabled():
        weight_OD = adjacent_rows(layers)
        if weight_OD is not None:
            return F.linear(x, weight_OD)
    outputs = [
        F.linear(
            product_input(x, weight_OD),
            weight_OD if isinstance(weight_OD, torch.Tensor) else weight_OD.dequantize(x.dtype),
            bias_O,
        )
        for weight_OD, bias_O in layers
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def adjacent_rows(layers: tuple[WeightAndBias, ...]) -> torch.Tensor | None:
    """Return the weights of several layers as one matrix, if they have no biases and follow each other in memory."""
    first, rows = layers[0][0], 0
    for weight_OD, bias_O in layers:
        if bias_O is not None or not isinstance(weight_OD, torch.Tensor) or not isinstance(first, torch.Tensor):
            return None
        follows = weight_OD.data_ptr() == first.data_ptr() + rows * first.shape[1] * first.element_size()
        is_alike = weight_OD.dtype == first.dtype and weight_OD.is_contiguous()
        is_one_memory = weight_OD.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (follows and is_alike and is_one_memory and weight_OD.shape[1] == first.shape[1]):
            return None
        rows += weight_OD.shape[0]
    assert isinstance(first, torch.Tensor)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
