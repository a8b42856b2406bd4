"""Modules whose weights may be block-scaled, and which weights of a model a format covers.

int8 covers all linear layers and experts. fp8 covers the matrices that the published checkpoint stores as FP8, on its
blocks. Routers, norms, embeddings and output heads always stay plain.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import nn

from openmimo.core.errors import ConfigError
from openmimo.kernels.weights import (
    FP8_BLOCK,
    INT8,
    PLAIN,
    BlockScaled,
    QuantizedFormat,
    Weight,
    copy_weight,
    empty_quantized,
)
from openmimo.model.fp8 import is_fp8_in_hub_layout

_SCALES = "_scales"
_QUANTIZED: dict[str, QuantizedFormat] = {"int8": "int8", "fp8": "fp8"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


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
        """Replace a weight by block-scaled storage without values."""
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


def set_weight(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Copies new values into the parameter or buffer `name` of a model, quantized if it is block-scaled."""
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, QuantizableModule) and own_name in module.blocks:
        module.store(own_name, tensor)
    else:
        getattr(module, own_name).copy_(tensor)


def quantized_format(weights: str) -> QuantizedFormat | None:
    """The option `weights` as a format, None for "plain". Raises ConfigError for an unknown one."""
    if weights == PLAIN:
        return None
    if not isinstance(weights, str) or weights not in _QUANTIZED:
        raise ConfigError(f"weights is {weights!r}; it must be one of {', '.join((PLAIN, *_QUANTIZED))}.")
    return _QUANTIZED[weights]


def allocate_quantized(model: nn.Module, weight_format: QuantizedFormat, qkv_ranks: int = 1) -> None:
    """Replaces the weights that a format covers by storage without values. Arguments as in `quantize_model`."""
    for module, name, block in _covered(model, weight_format, qkv_ranks):
        module.allocate(name, weight_format, block)


@torch.no_grad()
def quantize_model(model: nn.Module, weight_format: QuantizedFormat, qkv_ranks: int = 1) -> None:
    """Quantizes the weights that a format covers, in place: for inference, not to be saved.

    Args:
        model: A model in memory.
        weight_format: int8 or fp8.
        qkv_ranks: The ranks of the checkpoint layout (`ModelConfig.qkv_ranks`), which the blocks of fp8 respect.
    """
    for module, name, block in _covered(model, weight_format, qkv_ranks):
        tensor = getattr(module, name).detach()
        module.allocate(name, weight_format, block)
        module.store(name, tensor)


def _covered(
    model: nn.Module, weight_format: QuantizedFormat, qkv_ranks: int
) -> Iterator[tuple[QuantizableModule, str, tuple[int, int]]]:
    """Module, name and block size of each weight that a format covers."""
    for module_name, module in model.named_modules():
        if not isinstance(module, QuantizableModule):
            continue
        for name, num_matrices in module.quantizable.items():
            rows, columns = getattr(module, name).shape[-2:]
            if weight_format == INT8:
                yield module, name, (1, columns)
            elif num_matrices > 1 or is_fp8_in_hub_layout(f"{module_name}.{name}"):
                block_rows = _projection_block_rows(model, module_name, qkv_ranks) if name == "weight" else FP8_BLOCK
                if num_matrices > 1:
                    block_rows = math.gcd(block_rows, rows // num_matrices)
                yield module, name, (block_rows, FP8_BLOCK)


def _projection_block_rows(model: nn.Module, name: str, qkv_ranks: int) -> int:
    """Rows of an FP8 block of the linear layer `name`.

    A checkpoint may hold q, k and v on grids that begin again at each rank and run across all three (see `fp8`).
    Blocks that divide the rows of each part at a rank have one scale in all of these grids.
    """
    owner, _, own_name = name.rpartition(".")
    if own_name not in _PROJECTIONS:
        return FP8_BLOCK
    attention = model.get_submodule(owner)
    rows = [attention.get_parameter(f"{part}.weight").shape[0] for part in _PROJECTIONS]
    if any(count % qkv_ranks for count in rows):
        return FP8_BLOCK
    return math.gcd(FP8_BLOCK, *(count // qkv_ranks for count in rows))
