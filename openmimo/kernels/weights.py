"""Weight formats: a plain tensor, quantized codes with one scale per block, or packed signs.

O output dim, D input dim. Leading axes, such as that of stacked experts, are allowed in all functions.

A packed weight is a sum of stages; each stage quantizes what the stages before it left over. A stage holds one or two
bits for a number:

    format    numbers                            values of a stage           bits a real weight and stage
    binary    the weights                        +s, -s                      1
    ternary   the weights                        +s, 0, -s                   2 (BitNet b1.58, arXiv 2402.17764)
    fairy     complex weights of the rows        +s, -s, +it, -it            1 (PhaseQuant, arXiv 2508.05571)
              [Re W; Im W] of a matrix [2N, D]
    fairy2i   U and W of a real matrix as        +s, -s, +it, -it            1 (arXiv 2512.02901)
              y = U x + W conj(x)

Products with packed weights quantize their input to int8, with a scale for each token (for each token and half of the
input in fairy2i, whose halves are real and imaginary parts).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F

PLAIN = "plain"
INT8 = "int8"  # one scale per output
FP8 = "fp8"  # float8_e4m3fn, one scale per block
INT8_BLOCKS = "int8_blocks"  # int8 with any other block size
LATENT = "latent"  # plain, and trained to be packed
FP8_TRAINED = "fp8_trained"  # plain, and multiplied as FP8 in training
FAIRY2I, FAIRY, TERNARY, BINARY = "fairy2i", "fairy", "ternary", "binary"
PackedFormat: TypeAlias = Literal["fairy2i", "fairy", "ternary", "binary"]
PACKED: tuple[PackedFormat, ...] = ("fairy2i", "fairy", "ternary", "binary")
QuantizedFormat: TypeAlias = Literal["int8", "fp8"]

FP8_BLOCK = 128  # rows and columns of a block in the published checkpoint
FP8_MAX = 448.0
FP8_LEAST = 1e-30  # a block without a larger magnitude becomes zeros: its scale would not be a normal number
_INT8_MAX = 127
_LEAST_SCALE = 1e-5  # of PhaseQuant, and the divisor of ternary codes
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


class Packing(NamedTuple):
    """How one matrix is packed.

    Attributes:
        format: A name of `PACKED`.
        stages: Number of stages, 1 to 4.
        per_row: Whether each row has its own scales. Otherwise a stage has one for the matrix (and for each of U and
            W, and for each axis of the complex plane).
    """

    format: PackedFormat
    stages: int = 1
    per_row: bool = False

    @property
    def parts(self) -> int:
        """Number of matrices that a stage holds: U and W, or one."""
        return 2 if self.format == FAIRY2I else 1

    @property
    def planes(self) -> int:
        """Bits of a code. Bit 0 of two: the axis is imaginary, or the value is not zero. The last bit: the sign."""
        return 1 if self.format == BINARY else 2

    @property
    def axes(self) -> int:
        """Number of scales: one for each axis of the complex plane, or one."""
        return 2 if self.is_complex else 1

    @property
    def input_halves(self) -> int:
        """Number of parts of an input that have their own int8 scale."""
        return self.parts

    @property
    def is_complex(self) -> bool:
        """Whether the codes are complex."""
        return self.format in (FAIRY, FAIRY2I)

    def part_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the matrices of codes of a weight of this shape. Odd dims of fairy2i are rounded up."""
        if self.format == FAIRY2I:
            return -(-rows // 2), -(-columns // 2)
        return (rows // 2 if self.format == FAIRY else rows), columns

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of codes and scales of a matrix of this shape."""
        part_rows, part_columns = self.part_shape(rows, columns)
        codes = (self.stages, self.parts, part_rows, self.planes, -(-part_columns // 8))
        return codes, (self.stages, self.parts, part_rows if self.per_row else 1, self.axes)


class Packed(NamedTuple):
    """A weight [..., M x O, D] of M stacked matrices in a packed format.

    Attributes:
        codes: uint8, [..., M, stages, parts, rows, planes, bytes]. Bit j of byte b of a plane belongs to column 8b + j.
        scales: float32, [..., M, stages, parts, rows or 1, axes].
        packing: The format.
        matrix_shape: (O, D).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    packing: Packing
    matrix_shape: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        *leading, matrices = self.codes.shape[:-5]
        return torch.Size([*leading, matrices * self.matrix_shape[0], self.matrix_shape[1]])

    @property
    def requires_grad(self) -> bool:
        """Always False, because codes have no gradient."""
        return False

    @property
    def format(self) -> str:
        """Name of the format, by which backends accept or refuse a call."""
        return self.packing.format

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def is_contiguous(self) -> bool:
        """Return whether codes and scales may be read by address."""
        return self.codes.is_contiguous() and self.scales.is_contiguous()

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as a plain tensor, rounded to float32 (float64 for float64) and then to `dtype`."""
        leading = self.codes.shape[:-6]
        matrices = [Packed(*pair, self.packing, self.matrix_shape) for pair in self._matrices()]
        tiles = [tile for matrix in matrices for tile in matrix.tiles(dtype)]
        empty = torch.empty(0, self.matrix_shape[1], dtype=dtype, device=self.codes.device)
        return torch.cat([empty, *tiles]).view(*leading, *self.shape[-2:])

    def _matrices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield codes and scales of each matrix, with one stacked matrix each."""
        return zip(self.codes.flatten(0, -6).split(1), self.scales.flatten(0, -5).split(1), strict=True)

    def tiles(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield the rows of a stack of matrices [M x O, D] in order, in dequantized tiles of a few rows."""
        rows, columns = self.matrix_shape
        half_rows = self.packing.part_shape(rows, columns)[0]
        step = max(1, _TILE_NUMBERS // max(1, columns))
        for matrix in range(len(self.codes)):
            for half in range(2 if self.packing.is_complex else 1):
                stop = min(half_rows, rows - half * half_rows)
                for start in range(0, stop, step):
                    yield self._rows_of_half(matrix, half, start, min(stop, start + step), dtype)

    def _rows_of_half(self, matrix: int, half: int, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of a matrix, counted from its first row, or from its middle for the second half."""
        wide = torch.promote_types(dtype, torch.float32)
        columns = self.packing.part_shape(*self.matrix_shape)[1]
        scales = self.scales[matrix, :, :, start:stop] if self.packing.per_row else self.scales[matrix]
        codes = _unpack(self.codes[matrix, :, :, start:stop], columns)
        parts = _values(codes, scales.to(wide), self.packing).sum(dim=1)  # [axes, parts, rows, columns]
        if self.packing.format != FAIRY2I:
            return parts[half, 0].to(dtype)
        (u_re, w_re), (u_im, w_im) = parts
        blocks = (w_im + u_im, u_re - w_re) if half else (w_re + u_re, w_im - u_im)
        return torch.cat(blocks, dim=-1)[:, : self.matrix_shape[1]].to(dtype)

    def select(self, index: int) -> "Packed":
        """Return the weight at `index` of the first axis, as a view."""
        return Packed(self.codes[index], self.scales[index], self.packing, self.matrix_shape)

    def unbind(self) -> list["Packed"]:
        """Return the weights along the first axis, as views."""
        return [self.select(index) for index in range(len(self.codes))]

    def rows(self, start: int, stop: int) -> "Packed":
        """Return rows `start` to `stop`, which begin and end between matrices, as a view."""
        rows = self.matrix_shape[0]
        assert start % rows == 0 == stop % rows
        part = slice(start // rows, stop // rows)
        codes, scales = self.codes[..., part, :, :, :, :, :], self.scales[..., part, :, :, :, :]
        return Packed(codes, scales, self.packing, self.matrix_shape)

    def problem(self) -> str | None:
        """Return what is wrong with codes or scales that were read from a file, or None."""
        if not (torch.isfinite(self.scales) & (self.scales >= 0)).all():
            return "a scale is negative, infinite or NaN"
        columns = self.packing.part_shape(*self.matrix_shape)[1]
        if columns % 8 and (self.codes[..., -1] >> (columns % 8)).any():
            return "a code lies behind the last column"
        if self.packing.format == TERNARY and (self.codes[..., 1, :] & ~self.codes[..., 0, :]).any():
            return "a ternary code is -0"
        return None


class Latent(NamedTuple):
    """A plain weight [..., M x O, D] of which products use the packed values (quantization-aware training).

    The gradient of the values is given to the weight unchanged (straight-through).

    Attributes:
        tensor: The weight.
        packing: The format.
        matrices: M, the number of stacked matrices.
    """

    tensor: torch.Tensor
    packing: Packing
    matrices: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.tensor.shape

    @property
    def requires_grad(self) -> bool:
        """Whether the weight requires a gradient."""
        return self.tensor.requires_grad

    @property
    def format(self) -> str:
        """Name of the format, by which backends accept or refuse a call."""
        return LATENT

    def is_contiguous(self) -> bool:
        """Return whether the weight is contiguous."""
        return self.tensor.is_contiguous()

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the packed values in `dtype`, differentiable in the weight."""
        values = pack(self.tensor, self.packing, self.matrices).dequantize(torch.float32)
        return (self.tensor + (values - self.tensor.detach())).to(dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield the packed values of a matrix as one tile."""
        yield self.dequantize(dtype)

    def select(self, index: int) -> "Latent":
        """Return the weight at `index` of the first axis, as a view."""
        return self._replace(tensor=self.tensor[index])

    def unbind(self) -> list["Latent"]:
        """Return the weights along the first axis, as views."""
        return [self._replace(tensor=tensor) for tensor in self.tensor.unbind()]

    def rows(self, start: int, stop: int) -> "Latent":
        """Return rows `start` to `stop`, which begin and end between matrices, as a view."""
        rows = self.tensor.shape[-2] // self.matrices
        assert start % rows == 0 == stop % rows
        return self._replace(tensor=self.tensor[..., start:stop, :], matrices=(stop - start) // rows)


class Float8Latent(NamedTuple):
    """A plain weight [..., M x O, D] whose products compute with FP8 numbers in training; see `operations.FLOAT8`.

    Attributes:
        tensor: The weight, in its own dtype.
        matrices: M, the number of stacked matrices.
    """

    tensor: torch.Tensor
    matrices: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.tensor.shape

    @property
    def requires_grad(self) -> bool:
        """Whether the weight requires a gradient."""
        return self.tensor.requires_grad

    @property
    def format(self) -> str:
        """Name of the format, by which operations choose the product."""
        return FP8_TRAINED

    def is_contiguous(self) -> bool:
        """Return whether the weight is contiguous."""
        return self.tensor.is_contiguous()

    def quantized(self) -> BlockScaled:
        """Return the codes and scales that products use. Blocks divide each of the stacked matrices."""
        rows = self.tensor.shape[-2] // self.matrices
        block_rows = FP8_BLOCK if self.matrices == 1 else math.gcd(FP8_BLOCK, rows)
        return quantize(self.tensor, "fp8", block_rows=block_rows)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values that products use in `dtype`, without gradient."""
        return self.quantized().dequantize(dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield the values as one tile."""
        yield self.dequantize(dtype)

    def select(self, index: int) -> "Float8Latent":
        """Return the weight at `index` of the first axis, as a view."""
        return self._replace(tensor=self.tensor[index])

    def unbind(self) -> list["Float8Latent"]:
        """Return the weights along the first axis, as views."""
        return [self._replace(tensor=tensor) for tensor in self.tensor.unbind()]

    def rows(self, start: int, stop: int) -> "Float8Latent":
        """Return rows `start` to `stop`, which begin and end between matrices, as a view."""
        rows = self.tensor.shape[-2] // self.matrices
        assert start % rows == 0 == stop % rows
        return self._replace(tensor=self.tensor[..., start:stop, :], matrices=(stop - start) // rows)


def latent(tensor: torch.Tensor, trained_as: "Packing | Literal['fp8']", matrices: int) -> "Latent | Float8Latent":
    """Return a plain weight as one of which products use other values: packed ones or FP8 ones."""
    if isinstance(trained_as, Packing):
        return Latent(tensor, trained_as, matrices)
    return Float8Latent(tensor, matrices)


def _pack(bits: torch.Tensor) -> torch.Tensor:
    """Pack bits [..., columns] into bytes [..., ceil(columns / 8)]."""
    bits = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(dim=-1, dtype=torch.uint8)


def _unpack(codes: torch.Tensor, columns: int) -> torch.Tensor:
    """Invert `_pack`; returns uint8 [..., columns]."""
    bits = (codes[..., None] >> torch.arange(8, dtype=torch.uint8, device=codes.device)) & 1
    return bits.flatten(-2)[..., :columns]


def _values(bits: torch.Tensor, scales: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the values [axes, ...] of bits [..., rows, planes, columns] with scales [..., rows or 1, axes]."""
    signed = torch.where(bits[..., -1, :].bool(), -scales.movedim(-1, 0)[..., None], scales.movedim(-1, 0)[..., None])
    if packing.format == BINARY:
        return signed
    first = bits[..., 0, :].bool()
    return torch.where(torch.stack([~first, first]) if packing.is_complex else first[None], signed, 0.0)


def _encode(parts: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize one stage of [axes, parts, rows, columns]; returns bits [parts, rows, planes, columns] and scales."""
    dims = (-1,) if packing.per_row else (-2, -1)
    if not packing.is_complex:
        scale = parts.abs().mean(dim=dims, keepdim=True)
        if packing.format == BINARY:
            bits = (parts < 0).movedim(0, -2)
        else:
            codes = (parts / scale.clamp(min=_LEAST_SCALE)).round()
            bits = torch.cat([codes != 0, codes < 0]).movedim(0, -2)
        return bits, scale.squeeze(-1).movedim(0, -1)
    re, im = parts
    # The angle decides: [-45, 45) degrees is +1, [45, 135) is +i, and so on. Zero is +1.
    imaginary = (im.abs() > re.abs()) | ((re == im) & (re != 0))
    bits = torch.stack([imaginary, torch.where(imaginary, im, re) < 0], dim=-2)
    chosen = torch.stack([~imaginary, imaginary])
    total = torch.where(chosen, parts.abs(), 0.0).sum(dim=dims, keepdim=True)
    scale = (total / chosen.sum(dim=dims, keepdim=True).clamp(min=1)).clamp(min=_LEAST_SCALE)
    return bits, scale.squeeze(-1).movedim(0, -1)


def widely_linear(matrix: torch.Tensor) -> torch.Tensor:
    """Return U and W of a real matrix as y = U x + W conj(x): [2 (Re, Im), 2 (U, W), ceil(O / 2), ceil(D / 2)].

    x is the first half of the real input plus i times the second, and y likewise (arXiv 2512.02901). Odd dims are
    padded with zeros. `real_matrix` is the inverse.
    """
    rows, columns = matrix.shape
    top, bottom = F.pad(matrix, (0, columns % 2, 0, rows % 2)).chunk(2)
    (r11, r12), (r21, r22) = top.chunk(2, dim=1), bottom.chunk(2, dim=1)
    real = torch.stack([r11 + r22, r11 - r22])
    return torch.stack([real, torch.stack([r21 - r12, r12 + r21])]) / 2


def real_matrix(parts: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Invert `widely_linear` for a matrix of this shape."""
    (u_re, w_re), (u_im, w_im) = parts
    top, bottom = torch.cat([w_re + u_re, w_im - u_im], dim=1), torch.cat([w_im + u_im, u_re - w_re], dim=1)
    return torch.cat([top, bottom])[: shape[0], : shape[1]]


def pack(weight: torch.Tensor, packing: Packing, matrices: int = 1) -> Packed:
    """Quantize a weight [..., M x O, D] of M stacked matrices, one by one. NaN and infinities give such scales."""
    shape = (weight.shape[-2] // matrices, weight.shape[-1])
    packed = empty_packed(weight, packing, matrices)
    targets = packed._matrices()
    for matrix, (codes, scales) in zip(weight.detach().reshape(-1, *shape), targets, strict=True):
        rest = _parts(matrix.float(), packing)
        for stage in range(packing.stages):
            bits, stage_scales = _encode(rest, packing)
            codes[0, stage], scales[0, stage] = _pack(bits), stage_scales
            rest = rest - _values(bits, stage_scales, packing)
    return packed


def _parts(matrix: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the numbers that the codes of a matrix stand for, [axes, parts, rows, columns]."""
    if packing.format == FAIRY2I:
        return widely_linear(matrix)
    return matrix.view(packing.axes, 1, -1, matrix.shape[1])


def empty_packed(weight: torch.Tensor, packing: Packing, matrices: int = 1) -> Packed:
    """Allocate storage for a packed weight of this shape and device, without values."""
    shape = (weight.shape[-2] // matrices, weight.shape[-1])
    leading = (*weight.shape[:-2], matrices)
    codes_shape, scales_shape = packing.shapes(*shape)
    codes = torch.empty(*leading, *codes_shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(*leading, *scales_shape, dtype=torch.float32, device=weight.device)
    return Packed(codes, scales, packing, shape)


def int8_input(x: torch.Tensor, halves: int = 1) -> torch.Tensor:
    """Round x [..., D] to 255 levels of each row, or of each half of a row. The gradient is that of x itself.

    The largest magnitude becomes the level 127 (absmax). The first half of an odd D is the longer one.
    """
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    rounded = []
    for part in wide.split(max(1, -(-x.shape[-1] // halves)), dim=-1):
        scale = part.abs().amax(dim=-1, keepdim=True) / _INT8_MAX
        scale = torch.where(scale == 0, 1.0, scale)
        rounded.append((part / scale).round() * scale)
    result = torch.cat(rounded, dim=-1).to(x.dtype)
    return x + (result - x.detach()) if x.requires_grad else result


def product_input(x: torch.Tensor, weight: "Weight") -> torch.Tensor:
    """Return the input that a product with this weight uses: x, rounded to int8 levels for packed weights."""
    return int8_input(x, weight.packing.input_halves) if isinstance(weight, (Packed, Latent)) else x


Quantized: TypeAlias = BlockScaled | Packed
Weight: TypeAlias = torch.Tensor | BlockScaled | Packed | Latent | Float8Latent


def is_quantized(weight: Weight) -> TypeGuard[Quantized]:
    """Return whether a weight is not a plain tensor."""
    return type(weight) in (BlockScaled, Packed)


def format_of(weight: Weight) -> str:
    """Return the name of a weight's format."""
    return PLAIN if isinstance(weight, torch.Tensor) else weight.format


def dequantized(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight in any format as a tensor of `dtype`. A plain tensor of that dtype is returned unchanged."""
    if not isinstance(weight, torch.Tensor):
        return weight.dequantize(dtype)
    return weight if weight.dtype == dtype else weight.to(dtype)


def unbind(weight: Weight) -> Sequence[Weight]:
    """Return the weights along the first axis, as views."""
    return weight.unbind()


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Return rows `start` to `stop` of a weight in any format; see `BlockScaled.rows` and `Packed.rows`."""
    return weight[..., start:stop, :] if isinstance(weight, torch.Tensor) else weight.rows(start, stop)


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


def quantize(weight: torch.Tensor, weight_format: QuantizedFormat, *, block_rows: int | None = None) -> BlockScaled:
    """Quantize a weight [..., O, D] to the nearest codes. Stacked matrices are quantized one by one to save memory.

    The largest magnitude of a block becomes the largest code (127 or 448). A block of zeros has scale 1. NaN and
    infinities give values that are not finite.

    Args:
        weight: The weight, or for blocks of one row any matrix.
        weight_format: The format.
        block_rows: Rows of a block of fp8 (None: 128).
    """
    if weight.dim() > 2 and len(weight):
        parts = [quantize(part, weight_format, block_rows=block_rows) for part in weight]
        block = parts[0].block
        return BlockScaled(torch.stack([p.codes for p in parts]), torch.stack([p.scales for p in parts]), block)
    block = block_of(weight_format, weight.shape[-1])
    if weight_format == INT8:
        return _quantize_int8(weight, block)
    return _quantize_fp8(weight, (block_rows or block[0], block[1]))


def _quantize_int8(weight_OD: torch.Tensor, block: tuple[int, int]) -> BlockScaled:
    wide_OD = weight_OD.detach().float()
    largest_O1 = wide_OD.abs().amax(dim=1, keepdim=True)
    scales_O1 = torch.where(largest_O1 == 0, 1.0, largest_O1 / _INT8_MAX)  # NaN stays NaN
    return BlockScaled((wide_OD / scales_O1).round().to(torch.int8), scales_O1, block)


def _quantize_fp8(weight_OD: torch.Tensor, block: tuple[int, int]) -> BlockScaled:
    rows, columns = weight_OD.shape
    padded, missing = weight_OD.detach().float(), (0, -columns % block[1], 0, -rows % block[0])
    padded = F.pad(padded, missing) if any(missing) else padded.contiguous()
    blocks = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest >= FP8_LEAST, largest / FP8_MAX, 1.0)
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
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

    A quantized source of the same format keeps its codes and scales. Its blocks must be those of the target or
    multiples of them.
    """
    if isinstance(target, torch.Tensor):
        target.copy_(source if isinstance(source, torch.Tensor) else source.dequantize(torch.float32))
        return
    assert not isinstance(target, (Latent, Float8Latent)), "models hold plain weights"
    if isinstance(target, Packed):
        if not isinstance(source, Packed) or source.packing != target.packing:
            plain = dequantized(source, torch.float32).to(target.codes.device)
            source = pack(plain, target.packing, target.codes.shape[-6])
        target.codes.copy_(source.codes)
        target.scales.copy_(source.scales)
        return
    weight_format: QuantizedFormat = "fp8" if target.format == FP8 else "int8"
    if not isinstance(source, BlockScaled) or source.format != target.format:
        source = quantize(dequantized(source, torch.float32).to(target.codes.device), weight_format)
    source = source.with_block_rows(target.block[0])
    target.codes.copy_(source.codes)
    target.scales.copy_(source.scales)
