"""FP8 weights with 128 x 128 block scales, as the published checkpoint stores them: W = float(F8) * scale[block].

G key/value heads, K key dim, V value dim, D model dim.

Two layouts exist. Most matrices use one uniform grid of blocks. Where key and value rows were quantized per rank, as
one slice [Q_r | K_r | V_r] of a fused matrix, the grid starts anew at each rank, and a block may hold the last rows of
a rank's keys and the first of its values (docs/model.md tells how the split K and V scales must be read then).
"""

import torch

from openmimo.kernels.weights import FP8_BLOCK, BlockScaled, joined_rows
from openmimo.kernels.weights import quantize as kernels_quantize

BLOCK = FP8_BLOCK


def is_fp8_in_hub_layout(name: str) -> bool:
    """Whether the published FP8 checkpoint quantizes this tensor: attention inputs and every FFN, but not o_proj."""
    quantized = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj")
    return name.endswith(tuple(f".{part}.weight" for part in quantized))


def num_blocks(rows: int) -> int:
    """Blocks that cover `rows` rows, the last one cut short."""
    return -(-rows // BLOCK)


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Uniform blocks: weight [rows, cols] float8_e4m3fn, scale [ceil(rows/128), ceil(cols/128)] float32, to float32."""
    return BlockScaled(weight, scale, (BLOCK, BLOCK)).dequantize(torch.float32)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: float8_e4m3fn codes, and scales amax/448 per block (1 where a block is all zero)."""
    codes, scale, _ = kernels_quantize(weight, "fp8")
    return codes, scale


def quantize_ranks(weight: torch.Tensor, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix stacked of `num_ranks` slices, each with its own grid: codes, and the scales of all."""
    codes, scales = zip(*(quantize(part) for part in weight.chunk(num_ranks)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def has_rank_scales(scale_rows: int, num_ranks: int, rows: int) -> bool:
    """Whether a key matrix has scales per rank rather than uniform ones: it then has more rows of scales."""
    return rows % num_ranks == 0 and scale_rows == num_ranks * num_blocks(rows // num_ranks) != num_blocks(rows)


def split_ranks(fused: BlockScaled, rows: list[int], num_ranks: int) -> list[BlockScaled]:
    """Splits a fused matrix whose slice [Q_r | K_r | V_r] of each rank has its own grid.

    Args:
        fused: Codes [ranks * slice rows, D] and scales [ranks * ceil(slice rows / 128), ceil(D / 128)].
        rows: How many rows each part has, over all ranks.
        num_ranks: How many slices there are.

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


def split_rank_keys_values(k: BlockScaled, v: BlockScaled, num_ranks: int) -> list[BlockScaled]:
    """K [G*K, D] and V [G*V, D] that were quantized as one slice [K_r | V_r] per rank, each with its own scales.

    With K = 192 and V = 128 the slice of a rank has 320 rows and three rows of scales, of which the export put two with
    K and one with V: the second holds for K rows 128-191 and V rows 0-63.
    """
    codes, scales = (
        torch.cat([_per_rank(of_k, num_ranks), _per_rank(of_v, num_ranks)], dim=1).flatten(0, 1)
        for of_k, of_v in ((k.codes, v.codes), (k.scales, v.scales))
    )
    return split_ranks(BlockScaled(codes, scales, k.block), [k.shape[0], v.shape[0]], num_ranks)


def quantize_rank_keys_values(
    k: torch.Tensor, v: torch.Tensor, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `split_rank_keys_values`: codes of K and V, then their scales.

    The layout is that of the full layers of the published checkpoint.
    """
    rows = torch.cat([_per_rank(k, num_ranks), _per_rank(v, num_ranks)], dim=1).flatten(0, 1)
    codes, scale = quantize_ranks(rows, num_ranks)
    key_rows = k.shape[0] // num_ranks
    codes, scale = _per_rank(codes, num_ranks), _per_rank(scale, num_ranks)
    key_blocks = num_blocks(key_rows)
    return (
        codes[:, :key_rows].flatten(0, 1).contiguous(),
        codes[:, key_rows:].flatten(0, 1).contiguous(),
        scale[:, :key_blocks].flatten(0, 1).contiguous(),
        scale[:, key_blocks:].flatten(0, 1).contiguous(),
    )


def _per_rank(tensor: torch.Tensor, num_ranks: int) -> torch.Tensor:
    return tensor.view(num_ranks, tensor.shape[0] // num_ranks, *tensor.shape[1:])
