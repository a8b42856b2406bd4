"""FP8 weights with 128 x 128 block scales, as the published checkpoint stores them: W = float(F8) * scale[block].

G key/value heads, K key dim, V value dim, D model dim.

Two layouts exist. Most matrices use one uniform grid of blocks. Where key and value rows were quantized per rank, as
one slice [Q_r | K_r | V_r] of a fused matrix, the grid starts anew at each rank, and a block may hold the last rows of
a rank's keys and the first of its values (docs/model.md tells how the split K and V scales must be read then).
"""

import torch

BLOCK = 128
FP8_MAX = 448.0


def num_blocks(rows: int) -> int:
    """Blocks that cover `rows` rows, the last one cut short."""
    return -(-rows // BLOCK)


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Uniform blocks: weight [rows, cols] float8_e4m3fn, scale [ceil(rows/128), ceil(cols/128)] float32, to float32."""
    rows, cols = weight.shape
    grid = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
    return weight.float() * grid


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: float8_e4m3fn codes, and scales amax/448 per block (1 where a block is all zero)."""
    rows, cols = weight.shape
    padded = torch.zeros(num_blocks(rows) * BLOCK, num_blocks(cols) * BLOCK, dtype=torch.float32)
    padded[:rows, :cols] = weight
    blocks = padded.view(num_blocks(rows), BLOCK, num_blocks(cols), BLOCK)
    amax = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(amax > 0, amax / FP8_MAX, torch.ones_like(amax))
    codes = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:rows, :cols].contiguous(), scale


def dequantize_ranks(weight: torch.Tensor, scale: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """A matrix stacked of `num_ranks` slices, each with its own grid; scale [ranks * ceil(rows/ranks/128), ...]."""
    slices = zip(weight.chunk(num_ranks), scale.chunk(num_ranks), strict=True)
    return torch.cat([dequantize(*pair) for pair in slices])


def quantize_ranks(weight: torch.Tensor, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `dequantize_ranks`."""
    codes, scales = zip(*(quantize(part) for part in weight.chunk(num_ranks)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def has_rank_scales(scale_rows: int, num_ranks: int, rows: int) -> bool:
    """Whether a key matrix has scales per rank rather than uniform ones: it then has more rows of scales."""
    return rows % num_ranks == 0 and scale_rows == num_ranks * num_blocks(rows // num_ranks) != num_blocks(rows)


def dequantize_rank_keys_values(
    k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split K [G*K, D] and V [G*V, D] that were quantized as one slice [K_r | V_r] per rank; both to float32.

    With K = 192 and V = 128 the slice of a rank has 320 rows and three rows of scales, of which the export put two with
    K and one with V: the second holds for K rows 128-191 and V rows 0-63.
    """
    scale = torch.cat([_per_rank(k_scale, num_ranks), _per_rank(v_scale, num_ranks)], dim=1).flatten(0, 1)
    rows = torch.cat([_per_rank(k, num_ranks), _per_rank(v, num_ranks)], dim=1)
    restored = dequantize_ranks(rows.flatten(0, 1), scale, num_ranks).view(num_ranks, -1, k.shape[1])
    key_rows = k.shape[0] // num_ranks
    return restored[:, :key_rows].flatten(0, 1), restored[:, key_rows:].flatten(0, 1)


def quantize_rank_keys_values(
    k: torch.Tensor, v: torch.Tensor, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse: codes of K and V, then their scales, laid out as in the full layers of the published checkpoint."""
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
