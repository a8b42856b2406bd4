"""Weights kept narrower than they were loaded, so that a token reads fewer bytes of them."""

from openmimo.model.layers import Linear
from openmimo.model.mimo import MiMo


def quantise_linears(model: MiMo) -> None:
    """Linear layers to int8 with a scale for each output, in place; experts, routers, embedding and head stay."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "lm_head":
            module.quantise()
