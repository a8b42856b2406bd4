"""Weight formats: a plain tensor, or quantized codes with one scale per block.

O output dim, D input dim. Leading axes, such as that of stacked experts, are allowed in all functions.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F

PLAIN = "plain"
INT8 = "int8"  # one scale per output
FP8 = "fp8"  # float8_e4m3fn, one scale per block
INT8_BLOCKS = "int8_blocks"  # int8 with any other block size
QuantizedFormat: TypeAlias = Literal["int8", "fp8"]

FP8_BLOCK = 128  # rows and columns of a block in the published checkpoint
FP8_MAX = 448.0
_INT8_MAX = 127
_TILE_NUMBERS = 1 << 20  # 4 MiB of float32


class BlockScaled(NamedTuple):
    """A weight [..., O, D] whose value is `codes * scale of the block`.

    Attributes:
        codes: int8 or float8_e4m3fn, [..., O, D].
        scales: float32, [..., ceil(O / rows), ceil(D / columns)]. The last block of an axis may be smaller.
        block: (rows, columns) of a block.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.codes.shape

    @property
    def requires_grad(self) -> bool:
        """Always False, because codes have no gradient."""
        return False

    @property
    def format(self) -> str:
        """Name of the format, by which backends accept or refuse a call."""
        if self.codes.dtype == torch.float8_e4m3fn:
            return FP8
        return INT8 if self.block[0] == 1 and self.scales.shape[-1] == 1 else INT8_BLOCKS

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def is_contiguous(self) -> bool:
        """Return whether codes and scales may be read by address."""
        return self.codes.is_contiguous() and self.scales.is_contiguous()

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as a plain tensor, rounded to float32 (float64 for float64) and then to `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        scales = self.scales.to(wide)
        if self.block[0] > 1:
            scales = scales.repeat_interleave(self.block[0], -2)[..., : self.shape[-2], :]
        if scales.shape[-1] > 1:
            scales = scales.repeat_interleave(self.block[1], -1)[..., : self.shape[-1]]
        return self.codes.to(wide).mul_(scales).to(dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield the rows of a matrix [O, D] in order, in dequantized tiles of a few rows."""
        rows, columns = self.shape
        step = self.block[0] * max(1, _TILE_NUMBERS // max(1, columns * self.block[0]))
        for start in range(0, rows, step):
            yield self.rows(start, min(rows, start + step)).dequantize(dtype)

    def select(self, index: int) -> "BlockScaled":
        """Return the weight at `index` of the first axis, as a view."""
        return BlockScaled(self.codes[index], self.scales[index], self.block)

    def unbind(self) -> list["BlockScaled"]:
        """Return the weights along the first axis, as views."""
        return [self.select(index) for index in range(len(self.codes))]

    def rows(self, start: int, stop: int) -> "BlockScaled":
        """Return rows `start` to `stop`; a view, unless `start` is inside a block."""
        fine = self.with_block_rows(math.gcd(self.block[0], start))
        block_rows = fine.block[0]
        scales = fine.scales[..., start // block_rows : -(-stop // block_rows), :]
        return BlockScaled(fine.codes[..., start:stop, :], scales, fine.block)

    def with_block_rows(self, rows: int) -> "BlockScaled":
        """Return the same values with blocks of `rows` rows, a divisor of the current number."""
        if rows == self.block[0]:
            return self
        assert self.block[0] % rows == 0
        blocks = -(-self.shape[-2] // rows)
        scales = self.scales.repeat_interleave(self.block[0] // rows, -2)[..., :blocks, :].contiguous()
        return BlockScaled(self.codes, scales, (rows, self.block[1]))


Weight: TypeAlias = torch.Tensor | BlockScaled


def format_of(weight: Weight) -> str:
    """Return the name of a weight's format."""
    return weight.format if type(weight) is BlockScaled else PLAIN


def dequantized(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight in any format as a tensor of `dtype`. A plain tensor of that dtype is returned unchanged."""
    if isinstance(weight, BlockScaled):
        return weight.dequantize(dtype)
    return weight if weight.dtype == dtype else weight.to(dtype)


def unbind(weight: Weight) -> Sequence[Weight]:
    """Return the weights along the first axis, as views."""
    return weight.unbind()


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Return rows `start` to `stop` of a weight in any format; see `BlockScaled.rows`."""
    return weight.rows(start, stop) if isinstance(weight, BlockScaled) else weight[..., start:stop, :]


def joined_rows(parts: list[BlockScaled]) -> BlockScaled:
    """Concatenate weights of one format along their rows, with the largest blocks that divide all of them."""
    columns = {part.block[1] for part in parts}
    assert len(columns) == 1
    block_rows = math.gcd(*(part.block[0] for part in parts), *(part.shape[-2] for part in parts[:-1]))
    fine = [part.with_block_rows(block_rows) for part in parts]
    return BlockScaled(
        torch.cat([part.codes for part in fine], dim=-2),
        torch.cat([part.scales for part in fine], dim=-2),
        (block_rows, columns.pop()),
    )


def block_of(weight_format: QuantizedFormat, input_dim: int) -> tuple[int, int]:
    """Return the rows and columns of the blocks that `quantize` uses."""
    return (1, input_dim) if weight_format == INT8 else (FP8_BLOCK, FP8_BLOCK)


def quantize(weight: torch.Tensor, weight_format: QuantizedFormat) -> BlockScaled:
    """Quantize a weight [..., O, D] to the nearest codes. Stacked matrices are quantized one by one to save memory.

    The largest magnitude of a block becomes the largest code (127 or 448). A block of zeros has scale 1. NaN and
    infinities give values that are not finite.
    """
    if weight.dim() > 2 and len(weight):
        parts = [quantize(part, weight_format) for part in weight]
        block = parts[0].block
        return BlockScaled(torch.stack([p.codes for p in parts]), torch.stack([p.scales for p in parts]), block)
    block = block_of(weight_format, weight.shape[-1])
    return _quantize_int8(weight, block) if weight_format == INT8 else _quantize_fp8(weight, block)


def _quantize_int8(weight_OD: torch.Tensor, block: tuple[int, int]) -> BlockScaled:
    wide_OD = weight_OD.detach().float()
    largest_O1 = wide_OD.abs().amax(dim=1, keepdim=True)
    scales_O1 = torch.where(largest_O1 == 0, 1.0, largest_O1 / _INT8_MAX)  # NaN stays NaN
    return BlockScaled((wide_OD / scales_O1).round().to(torch.int8), scales_O1, block)


def _quantize_fp8(weight_OD: torch.Tensor, block: tuple[int, int]) -> BlockScaled:
    (rows, columns), size = weight_OD.shape, FP8_BLOCK
    padded = F.pad(weight_OD.detach().float(), (0, -columns % size, 0, -rows % size))
    blocks = padded.view(padded.shape[0] // size, size, padded.shape[1] // size, size)
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    codes = (blocks / scales[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return BlockScaled(codes.view(padded.shape)[:rows, :columns].contiguous(), scales, block)


def empty_quantized(weight: torch.Tensor, weight_format: QuantizedFormat, block: tuple[int, int]) -> BlockScaled:
    """Allocate storage for a quantized weight of this shape and device, without values; see `copy_weight`."""
    rows, columns = (-(-dim // size) for dim, size in zip(weight.shape[-2:], block, strict=True))
    dtype = torch.int8 if weight_format == INT8 else torch.float8_e4m3fn
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = torch.empty((*weight.shape[:-2], rows, columns), dtype=torch.float32, device=weight.device)
    return BlockScaled(codes, scales, block)


def copy_weight(target: Weight, source: Weight) -> None:
    """Copy `source` into the storage of `target`, in the format of `target`.

    A block-scaled source of the same format keeps its codes and scales. Its blocks must be those of the target or
    multiples of them.
    """
    if not isinstance(target, BlockScaled):
        target.copy_(source.dequantize(torch.float32) if isinstance(source, BlockScaled) else source)
        return
    weight_format: QuantizedFormat = "fp8" if target.format == FP8 else "int8"
    if not isinstance(source, BlockScaled) or source.format != target.format:
        source = quantize(dequantized(source, torch.float32).to(target.codes.device), weight_format)
    source = source.with_block_rows(target.block[0])
    target.codes.copy_(source.codes)
    target.scales.copy_(source.scales)
