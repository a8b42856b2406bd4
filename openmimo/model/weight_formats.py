"""Modules whose weights may be block-scaled."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from openmimo.kernels.weights import BlockScaled, QuantizedFormat, Weight, copy_weight, empty_quantized

_SCALES = "_scales"


class QuantizableModule(nn.Module):
    """A module whose weights [..., O, D] may be held block-scaled, for inference.

    A block-scaled weight is a parameter of codes under the weight's name, and a buffer of scales under that name plus
    `_scales`. Both move between devices with the module. A change of the module's dtype leaves both as they are.

    Attributes:
        quantizable: The weights that may be block-scaled, and how many matrices each stacks along its rows. Each
            matrix is quantized on its own.
        blocks: The (rows, columns) of the blocks of each block-scaled weight.
    """

    quantizable: Mapping[str, int] = MappingProxyType({})
    blocks: Mapping[str, tuple[int, int]] = MappingProxyType({})

    def weight_as(self, name: str, dtype: torch.dtype) -> Weight:
        """A weight for a product in `dtype`: a tensor of that dtype, or a block-scaled weight as it is held."""
        tensor = self._parameters.get(name)  # a fifth of the time of getattr; a parametrized tensor is not in it
        if tensor is None:
            tensor = getattr(self, name)
        if name in self.blocks:
            return self._block_scaled(name, tensor)
        return tensor if tensor.dtype == dtype else tensor.to(dtype)

    def held_weight(self, name: str) -> Weight:
        """A weight as it is held, without gradient. Changes of its values change the module."""
        tensor = getattr(self, name).detach()
        return self._block_scaled(name, tensor) if name in self.blocks else tensor

    def allocate(self, name: str, weight_format: QuantizedFormat, block: tuple[int, int]) -> None:
        """Replaces a weight by block-scaled storage without values."""
        self._hold(name, empty_quantized(getattr(self, name), weight_format, block))

    def store(self, name: str, tensor: torch.Tensor) -> None:
        """Copies new values into a weight, and quantizes them if it is block-scaled."""
        held = self.held_weight(name)
        if not isinstance(held, BlockScaled):
            copy_weight(held, tensor)
            return
        step = tensor.shape[-2] // self.quantizable[name]
        for start in range(0, tensor.shape[-2], step):
            copy_weight(held.rows(start, start + step), tensor[..., start : start + step, :])

    def _block_scaled(self, name: str, codes: torch.Tensor) -> BlockScaled:
        scales = self._buffers[name + _SCALES]
        assert scales is not None
        return BlockScaled(codes, scales, self.blocks[name])

    def _hold(self, name: str, weight: BlockScaled) -> None:
        setattr(self, name, nn.Parameter(weight.codes, requires_grad=False))
        self.register_buffer(name + _SCALES, weight.scales)
        self.blocks = {**self.blocks, name: weight.block}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizableModule":
        """The method of nn.Module behind `to`, `float` and others. Codes and scales pass as integers: no cast."""
        held = {name: self.held_weight(name) for name in self.blocks}
        super()._apply(fn, recurse)
        for name, weight in held.items():
            assert isinstance(weight, BlockScaled)
            codes = fn(weight.codes.view(torch.uint8)).view(weight.codes.dtype)
            scales = fn(weight.scales.view(torch.int32)).view(torch.float32)
            self._hold(name, BlockScaled(codes, scales, weight.block))
        return self


def entry_weight(model: nn.Module, name: str, tensor: torch.Tensor) -> Weight | None:
    """The weight of an entry of a model's state: None for scales, the block-scaled weight for codes, else `tensor`."""
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, QuantizableModule) or not module.blocks:
        return tensor
    if own_name.endswith(_SCALES) and own_name.removesuffix(_SCALES) in module.blocks:
        return None
    return module.held_weight(own_name) if own_name in module.blocks else tensor
