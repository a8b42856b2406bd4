"""Quantized weights of any format: tiles of rows are dequantized and multiplied one after another.

The whole matrix never exists in a wide dtype. On a CPU, products are computed in float32 or better.
"""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import LinearNeed, WeightAndBias
from openmimo.kernels.weights import PLAIN, product_input


def run(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_cpu else x.dtype
    wide = x.to(dtype)
    outputs = []
    for weight_OD, bias_O in layers:
        if not isinstance(weight_OD, torch.Tensor):
            source = product_input(wide, weight_OD)
            products = [F.linear(source, tile) for tile in weight_OD.tiles(dtype)]
            out = torch.cat(products or [wide.new_empty(*x.shape[:-1], 0)], dim=-1).to(x.dtype)
            outputs.append(out if bias_O is None else out + bias_O)
        else:
            outputs.append(F.linear(x, weight_OD, bias_O))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def refuse(need: LinearNeed) -> str | None:
    """Refuse calls without a quantized weight."""
    return "the weights are plain" if need.weight_format == PLAIN else None


PLUGIN = Backend(priority=20, run=run, refuse=refuse)
