"""Weights kept narrower than they were loaded, so that a token reads fewer bytes of them."""

import torch

from openmimo.model.layers import Linear
from openmimo.model.mimo import MiMo


def quantize_linears(model: MiMo) -> None:
    """Linear layers to int8 with a scale for each output, in place; experts, routers, embedding and head stay."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "lm_head":
            module.quantize()


def set_weight(model: MiMo, name: str, tensor: torch.Tensor) -> None:
    """New numbers for the parameter or buffer `name`, where that lies; quantized anew if it is int8."""
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, Linear) and own_name == "weight" and module.scale_O is not None:
        module.quantize(tensor.to(module.weight.device))
    else:
        getattr(module, own_name).copy_(tensor)
