"""FP8 weights with 128 x 128 block scales, as the published checkpoint stores them: W = float(F8) * scale[block].

G key/value heads, K key dim, V value dim, D model dim.

There are two layouts. Most matrices have one uniform grid of blocks. Keys and values of full layers were quantized per
rank, as parts of a fused slice [Q_r | K_r | V_r]. The grid then restarts at each rank, and a block may hold the last
rows of a rank's keys and the first rows of its values. With K = 192 and V = 128 and one key/value head per rank:

    row          0          128       192       256       320
    part         |        K_r          |        V_r         |
    block        |     0     |         1         |    2     |
    scales in    k_proj      k_proj              v_proj

docs/model.md describes how the scales of split K and V are read.
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
    """Number of blocks that cover `rows` rows; the last one may be partial."""
    return -(-rows // BLOCK)


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantize a matrix with uniform blocks to float32.

    Args:
        weight: Codes, float8_e4m3fn [rows, cols].
        scale: float32 [ceil(rows/128), ceil(cols/128)].
    """
    return BlockScaled(weight, scale, (BLOCK, BLOCK)).dequantize(torch.float32)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to float8_e4m3fn codes with scales amax/448 per block (1 for a block of zeros)."""
    codes, scale, _ = kernels_quantize(weight, "fp8")
    return codes, scale


def quantize_ranks(weight: torch.Tensor, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a stack of `num_ranks` slices, each on its own grid; returns codes and scales, stacked likewise."""
    codes, scales = zip(*(quantize(part) for part in weight.chunk(num_ranks)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def has_rank_scales(scale_rows: int, num_ranks: int, rows: int) -> bool:
    """Whether a key matrix was quantized per rank: it then has more rows of scales than with uniform blocks."""
    return rows % num_ranks == 0 and scale_rows == num_ranks * num_blocks(rows // num_ranks) != num_blocks(rows)


def split_ranks(fused: BlockScaled, rows: list[int], num_ranks: int) -> list[BlockScaled]:
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


def split_rank_keys_values(k: BlockScaled, v: BlockScaled, num_ranks: int) -> list[BlockScaled]:
    """Give K [G*K, D] and V [G*V, D], which were quantized as one slice [K_r | V_r] per rank, each its own scales.

    With K = 192 and V = 128, the slice of a rank has 320 rows and three rows of scales. The checkpoint stores two of
    them with K and one with V; the second is the scale of K rows 128-191 and of V rows 0-63.
    """
    codes, scales = (
        torch.cat([_per_rank(of_k, num_ranks), _per_rank(of_v, num_ranks)], dim=1).flatten(0, 1)
        for of_k, of_v in ((k.codes, v.codes), (k.scales, v.scales))
    )
    return split_ranks(BlockScaled(codes, scales, k.block), [k.shape[0], v.shape[0]], num_ranks)


def quantize_rank_keys_values(
    k: torch.Tensor, v: torch.Tensor, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Invert `split_rank_keys_values`; returns the codes of K and V, then their scales.

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
