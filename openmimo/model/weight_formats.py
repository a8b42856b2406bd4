"""Modules whose weights may be quantized, the weights that a format covers, and the FP8 layouts of checkpoints.

int8 and the packed formats cover all linear layers and experts. fp8 covers the matrices that the published checkpoint
stores as FP8, on its blocks of 128 x 128: W = float(F8) * scale[block]. Routers, norms, embeddings and output heads
always stay plain.

A checkpoint has two FP8 layouts. Most matrices have one uniform grid of blocks. Keys and values of full layers were
quantized per rank, as parts of a fused slice [Q_r | K_r | V_r]. The grid then restarts at each rank, and a block may
hold the last rows of a rank's keys and the first rows of its values. With K = 192 and V = 128 and one key/value head
per rank:

    row          0          128       192       256       320
    part         |        K_r          |        V_r         |
    block        |     0     |         1         |    2     |
    scales in    k_proj      k_proj              v_proj

docs/model.md describes how the scales of split K and V are read.

G key/value heads, K key dim, V value dim, D model dim.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from openmimo.core.errors import ConfigError
from openmimo.kernels.weights import (
    FAIRY,
    FAIRY2I,
    FP8_BLOCK,
    INT8,
    PACKED,
    PLAIN,
    BlockScaled,
    Packed,
    Packing,
    Quantized,
    QuantizedFormat,
    Weight,
    copy_weight,
    empty_packed,
    empty_quantized,
    is_quantized,
    joined_rows,
    latent,
    quantize,
)

_SCALES = "_scales"
Layout = tuple[int, int] | tuple[Packing, tuple[int, int]]  # rows and columns of a block; packing and matrix shape
WeightLayout = QuantizedFormat | Packing
_BLOCK_SCALED: dict[str, QuantizedFormat] = {"int8": "int8", "fp8": "fp8"}
_DEFAULT_STAGES = {FAIRY2I: 2}  # 2 bits a weight, as published; the other formats have one stage
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class QuantizableModule(nn.Module):
    """A module whose weights [..., O, D] may be held quantized, for inference.

    A quantized weight is a parameter of codes under the weight's name, and a buffer of scales under that name plus
    `_scales`. Both move between devices with the module. A change of the module's dtype leaves both as they are.

    Attributes:
        quantizable: The weights that may be quantized, and how many matrices each stacks along its rows. Each matrix
            is quantized separately.
        is_complex: Whether a matrix has the rows of real parts, then those of imaginary parts, of complex weights.
        blocks: The layout of each quantized weight: (rows, columns) of a block, or the packing and shape of a matrix.
        trained_as: The packing, or fp8, whose values products use although the weights are plain (None: the weights).
    """

    quantizable: Mapping[str, int] = MappingProxyType({})
    is_complex = False
    blocks: Mapping[str, Layout] = MappingProxyType({})
    trained_as: Packing | Literal["fp8"] | None = None

    def weight_as(self, name: str, dtype: torch.dtype) -> Weight:
        """Return a weight for a product in `dtype`: a tensor of that dtype, or a quantized weight as it is held."""
        tensor = self._parameters.get(name)  # a fifth of the time of getattr; a parametrized tensor is not in it
        if tensor is None:
            tensor = getattr(self, name)
        if name in self.blocks:
            return self._quantized(name, tensor)
        if self.trained_as is not None and name in self.quantizable:
            return latent(tensor, self.trained_as, self.quantizable[name])
        return tensor if tensor.dtype == dtype else tensor.to(dtype)

    def held_weight(self, name: str) -> Weight:
        """Return a weight as it is held, without gradient. Changes of its values change the module."""
        tensor = getattr(self, name).detach()
        return self._quantized(name, tensor) if name in self.blocks else tensor

    def allocate(self, name: str, layout: WeightLayout, block: tuple[int, int]) -> None:
        """Replace a weight by quantized storage without values. `block` is for the block-scaled formats."""
        plain = getattr(self, name)
        if isinstance(layout, Packing):
            self._hold(name, empty_packed(plain, layout, self.quantizable[name]))
        else:
            self._hold(name, empty_quantized(plain, layout, block))

    def store(self, name: str, tensor: torch.Tensor) -> None:
        """Copy new values into a weight, quantized if the weight is held so."""
        stored = self.held_weight(name)
        if isinstance(stored, torch.Tensor):
            copy_weight(stored, tensor)
            return
        step = tensor.shape[-2] // self.quantizable[name]
        for start in range(0, tensor.shape[-2], step):
            copy_weight(stored.rows(start, start + step), tensor[..., start : start + step, :])

    def _quantized(self, name: str, codes: torch.Tensor) -> Quantized:
        scales = self._buffers[name + _SCALES]
        assert scales is not None
        first, second = self.blocks[name]
        if isinstance(first, Packing):
            assert isinstance(second, tuple)
            return Packed(codes, scales, first, second)
        assert isinstance(second, int)
        return BlockScaled(codes, scales, (first, second))

    def _hold(self, name: str, weight: Quantized) -> None:
        setattr(self, name, nn.Parameter(weight.codes, requires_grad=False))
        self.register_buffer(name + _SCALES, weight.scales)
        layout = weight.block if isinstance(weight, BlockScaled) else (weight.packing, weight.matrix_shape)
        self.blocks = {**self.blocks, name: layout}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizableModule":
        """Extend the method of nn.Module behind `to` and others. Codes and scales pass as integers, without a cast."""
        stored = {name: self.held_weight(name) for name in self.blocks}
        super()._apply(fn, recurse)
        for name, weight in stored.items():
            assert is_quantized(weight)
            codes = fn(weight.codes.view(torch.uint8)).view(weight.codes.dtype)
            scales = fn(weight.scales.view(torch.int32)).view(torch.float32)
            self._hold(name, weight._replace(codes=codes, scales=scales))
        return self


def entry_weight(model: nn.Module, name: str, tensor: torch.Tensor) -> Weight | None:
    """Return the weight of a state entry: None for scales, the quantized weight for codes, else `tensor`."""
    owner, _, local_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, QuantizableModule) or not module.blocks:
        return tensor
    if local_name.endswith(_SCALES) and local_name.removesuffix(_SCALES) in module.blocks:
        return None
    return module.held_weight(local_name) if local_name in module.blocks else tensor


def set_weight(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Copy new values into the parameter or buffer `name` of a model, quantized if it is held so."""
    owner, _, local_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, QuantizableModule) and local_name in module.blocks:
        module.store(local_name, tensor)
    else:
        getattr(module, local_name).copy_(tensor)


def quantized_format(weights: str, stored: Packing | None = None) -> WeightLayout | None:
    """Return the option `weights` as a format; None for "plain". Raises ConfigError for an unknown one.

    Args:
        weights: The option.
        stored: The packing of the checkpoint, which is kept if its format is that of the option.
    """
    if weights == PLAIN:
        return None
    for name in PACKED:
        if weights == name:
            return stored if stored and stored.format == name else Packing(name, _DEFAULT_STAGES.get(name, 1))
    if not isinstance(weights, str) or weights not in _BLOCK_SCALED:
        raise ConfigError(f"weights is {weights!r}; it must be one of {', '.join((PLAIN, *_BLOCK_SCALED, *PACKED))}.")
    return _BLOCK_SCALED[weights]


def allocate_quantized(model: nn.Module, layout: WeightLayout, qkv_ranks: int = 1) -> None:
    """Replace the weights that a format covers by storage without values. Arguments as in `quantize_model`."""
    for module, name, block in list(_covered(model, layout, qkv_ranks)):
        module.allocate(name, layout, block)


def train_packed(model: nn.Module, packing: Packing | None) -> None:
    """Make products use the packed values of the weights and int8 inputs, for quantization-aware training.

    The weights stay plain. `quantize_model` with the same packing later gives the same products.

    Args:
        model: A plain model.
        packing: The format; None to undo it.

    Raises:
        ConfigError: The format needs complex weights and the model has real ones, or the reverse.
    """
    for module_name, module in model.named_modules():
        if isinstance(module, QuantizableModule) and module.quantizable:
            if packing is not None:
                _check_arithmetic(module_name, packing, module.is_complex)
            module.trained_as = packing


def train_float8(model: nn.Module) -> None:
    """Make the products of the weights that the format fp8 covers compute with FP8 numbers, for training.

    These are the input projections of attention, dense FFNs and experts; output projections, heads, embeddings, norms
    and routers stay as they are (paper section 3.1). The weights stay plain.
    """
    for module, _, _ in _covered(model, "fp8", 1):
        module.trained_as = "fp8"


def copy_training(source: nn.Module, target: nn.Module) -> None:
    """Make the products of a copy use what those of the source use by `train_packed` or `train_float8`."""
    for module, copied in zip(source.modules(), target.modules(), strict=True):
        if isinstance(module, QuantizableModule) and isinstance(copied, QuantizableModule):
            copied.trained_as = module.trained_as


@torch.no_grad()
def quantize_model(model: nn.Module, layout: WeightLayout, qkv_ranks: int = 1) -> None:
    """Quantize the weights that a format covers in place. The model is then for inference.

    Args:
        model: A model in memory.
        layout: int8, fp8, or a packing.
        qkv_ranks: The ranks of the checkpoint layout (`ModelConfig.qkv_ranks`), which the blocks of fp8 respect.

    Raises:
        ConfigError: The format needs complex weights and the model has real ones, or the reverse.
    """
    for module, name, block in list(_covered(model, layout, qkv_ranks)):
        tensor = getattr(module, name).detach()
        module.allocate(name, layout, block)
        module.store(name, tensor)


def _covered(
    model: nn.Module, layout: WeightLayout, qkv_ranks: int
) -> Iterator[tuple[QuantizableModule, str, tuple[int, int]]]:
    """Yield module, name and block size of each weight that a format covers. A packed format has no block."""
    if isinstance(layout, Packing):
        for module_name, module in model.named_modules():
            for name in module.quantizable if isinstance(module, QuantizableModule) else ():
                assert isinstance(module, QuantizableModule)
                _check_arithmetic(f"{module_name}.{name}", layout, module.is_complex)
                yield module, name, (0, 0)
        return
    for module_name, module in model.named_modules():
        if not isinstance(module, QuantizableModule):
            continue
        for name, num_matrices in module.quantizable.items():
            *stack, rows, columns = getattr(module, name).shape
            if layout == INT8:
                yield module, name, (1, columns)
            elif stack or is_fp8_in_hub_layout(f"{module_name}.{name}"):  # checkpoints name the experts one by one
                block_rows = _projection_block_rows(model, module_name, qkv_ranks) if name == "weight" else FP8_BLOCK
                if num_matrices > 1:
                    block_rows = math.gcd(block_rows, rows // num_matrices)
                yield module, name, (block_rows, FP8_BLOCK)


def _check_arithmetic(name: str, packing: Packing, is_complex: bool) -> None:
    if packing.format == FAIRY and not is_complex:
        raise ConfigError(
            f"the format fairy is for complex weights, but {name} is real; the format fairy2i converts it."
        )
    if packing.format == FAIRY2I and is_complex:
        raise ConfigError(f"the format fairy2i is for real weights, but {name} is complex; use the format fairy.")


def _projection_block_rows(model: nn.Module, name: str, qkv_ranks: int) -> int:
    """Return the number of rows of an FP8 block of the linear layer `name`.

    A checkpoint may hold q, k and v on grids that restart at each rank and run across all three.
    Blocks that divide the rows of each part at a rank have one scale in all of these grids.
    """
    owner, _, local_name = name.rpartition(".")
    if local_name not in _PROJECTIONS:
        return FP8_BLOCK
    attention = model.get_submodule(owner)
    rows = [attention.get_parameter(f"{part}.weight").shape[0] for part in _PROJECTIONS]
    if any(count % qkv_ranks for count in rows):
        return FP8_BLOCK
    return math.gcd(FP8_BLOCK, *(count // qkv_ranks for count in rows))


def is_fp8_in_hub_layout(name: str) -> bool:
    """Return whether the published FP8 checkpoint quantizes a tensor: attention inputs and FFNs, but not o_proj."""
    quantized = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj")
    return name.endswith(tuple(f".{part}.weight" for part in quantized))


def num_fp8_blocks(rows: int) -> int:
    """Return the number of blocks that cover `rows` rows; the last one may be partial."""
    return -(-rows // FP8_BLOCK)


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantize a matrix with uniform blocks to float32.

    Args:
        weight: Codes, float8_e4m3fn [rows, cols].
        scale: float32 [ceil(rows/128), ceil(cols/128)].
    """
    return BlockScaled(weight, scale, (FP8_BLOCK, FP8_BLOCK)).dequantize(torch.float32)


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to float8_e4m3fn codes with scales amax/448 per block (1 for a block of zeros)."""
    codes, scale, _ = quantize(weight, "fp8")
    return codes, scale


def quantize_fp8_ranks(weight: torch.Tensor, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a stack of `num_ranks` slices, each on its own grid; returns codes and scales, stacked likewise."""
    codes, scales = zip(*(quantize_fp8(part) for part in weight.chunk(num_ranks)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def has_fp8_rank_scales(scale_rows: int, num_ranks: int, rows: int) -> bool:
    """Return whether a key matrix was quantized per rank: it then has more rows of scales than with uniform blocks."""
    return rows % num_ranks == 0 and scale_rows == num_ranks * num_fp8_blocks(rows // num_ranks) != num_fp8_blocks(rows)


def split_fp8_ranks(fused: BlockScaled, rows: list[int], num_ranks: int) -> list[BlockScaled]:
    """Split a fused matrix whose slice [Q_r | K_r | V_r] of each rank has its own grid.

    Args:
        fused: Codes [ranks * slice rows, D] and scales [ranks * ceil(slice rows / 128), ceil(D / 128)].
        rows: Number of rows of each part, over all ranks.
        num_ranks: Number of slices.

    Returns:
        The parts with their ranks in order. Their blocks have as few rows as exact scales require.
    """
    slices = [
        BlockScaled(codes, scales, fused.block)
        for codes, scales in zip(fused.codes.chunk(num_ranks), fused.scales.chunk(num_ranks), strict=True)
    ]
    parts, start = [], 0
    for count in rows:
        stop = start + count // num_ranks
        parts.append(joined_rows([rank.rows(start, stop) for rank in slices]))
        start = stop
    return parts


def split_fp8_rank_keys_values(k: BlockScaled, v: BlockScaled, num_ranks: int) -> list[BlockScaled]:
    """Split K [G*K, D] and V [G*V, D], quantized as one slice [K_r | V_r] per rank, into parts with separate scales.

    With K = 192 and V = 128, the slice of a rank has 320 rows and three rows of scales. The checkpoint stores two of
    them with K and one with V; the second is the scale of K rows 128-191 and of V rows 0-63.
    """
    codes, scales = (
        torch.cat([_per_rank(k_part, num_ranks), _per_rank(v_part, num_ranks)], dim=1).flatten(0, 1)
        for k_part, v_part in ((k.codes, v.codes), (k.scales, v.scales))
    )
    return split_fp8_ranks(BlockScaled(codes, scales, k.block), [k.shape[0], v.shape[0]], num_ranks)


def quantize_fp8_rank_keys_values(
    k: torch.Tensor, v: torch.Tensor, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Invert `split_fp8_rank_keys_values`; returns the codes of K and V, then their scales.

    The layout is that of the full layers of the published checkpoint.
    """
    rows = torch.cat([_per_rank(k, num_ranks), _per_rank(v, num_ranks)], dim=1).flatten(0, 1)
    codes, scale = quantize_fp8_ranks(rows, num_ranks)
    key_rows = k.shape[0] // num_ranks
    codes, scale = _per_rank(codes, num_ranks), _per_rank(scale, num_ranks)
    key_blocks = num_fp8_blocks(key_rows)
    return (
        codes[:, :key_rows].flatten(0, 1).contiguous(),
        codes[:, key_rows:].flatten(0, 1).contiguous(),
        scale[:, :key_blocks].flatten(0, 1).contiguous(),
        scale[:, key_blocks:].flatten(0, 1).contiguous(),
    )


def _per_rank(tensor: torch.Tensor, num_ranks: int) -> torch.Tensor:
    return tensor.view(num_ranks, tensor.shape[0] // num_ranks, *tensor.shape[1:])
