"""New values for the weights of a model while an engine uses it."""

import torch

from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import QuantizableModule


def set_weight(model: MiMo, name: str, tensor: torch.Tensor) -> None:
    """Copies new values into the parameter or buffer `name`, quantized if it is block-scaled."""
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, QuantizableModule) and own_name in module.blocks:
        module.store(own_name, tensor)
    else:
        getattr(module, own_name).copy_(tensor)
