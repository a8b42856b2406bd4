"""The definition: codes and scales by torch, and exact products of codes with float32 sums.

P rows, C and O the dims of a weight [O, C], K summed dim, N output dim.
"""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import Float8Functions
from openmimo.kernels.weights import FP8_BLOCK, BlockScaled, Float8Latent, joined_rows, quantize


def quantize_rows(
    rows_NC: torch.Tensor, places_P: torch.Tensor | None, with_transposed: bool
) -> tuple[BlockScaled, BlockScaled | None]:
    """Implement `Float8Functions.quantize`."""
    if places_P is not None:
        rows_NC = torch.where((places_P >= 0)[:, None], rows_NC[places_P.clamp(min=0)], 0.0)
    transposed = quantize(rows_NC.T, "fp8", block_rows=1) if with_transposed else None
    return quantize(rows_NC, "fp8", block_rows=1), transposed


def quantize_weight(weights: tuple[Float8Latent, ...], transpose: bool) -> BlockScaled:
    """Implement `Float8Functions.quantize_weight`."""
    parts = [weight.quantized() for weight in weights]
    codes, scales, block = parts[0] if len(parts) == 1 else joined_rows(parts)
    if codes.dim() == 2:
        codes, scales = codes[None], scales[None]
    if transpose:
        return BlockScaled(codes.mT.contiguous(), scales.mT.contiguous(), (block[1], block[0]))
    return BlockScaled(codes, scales, block)


def multiply(
    rows_PK: BlockScaled, weight_ENK: BlockScaled, ends_E: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Implement `Float8Functions.multiply`."""
    outputs = rows_PK.codes.new_zeros(rows_PK.shape[0], weight_ENK.shape[1], dtype=dtype)
    for (start, stop), weight_NK in zip(_ranges(ends_E, rows_PK.shape[0]), weight_ENK.unbind(), strict=True):
        outputs[start:stop] = _sum_of_blocks(rows_PK.rows(start, stop), weight_NK).to(dtype)
    return outputs


def weight_gradient(gradient_OP: BlockScaled, input_CP: BlockScaled, ends_E: torch.Tensor | None) -> torch.Tensor:
    """Implement `Float8Functions.weight_gradient`."""
    products = [
        _sum_of_blocks(_columns(gradient_OP, start, stop), _columns(input_CP, start, stop))
        for start, stop in _ranges(ends_E, input_CP.shape[1])
    ]
    return torch.stack(products)


def gate(
    gate_up_PH: torch.Tensor, weights_P: torch.Tensor, for_backward: bool
) -> tuple[BlockScaled, BlockScaled | None]:
    """Implement `Float8Functions.gate`."""
    gate_PF, up_PF = gate_up_PH.float().chunk(2, dim=-1)
    codes = quantize_rows(gate_up_PH, None, False)[0] if for_backward else None
    return quantize_rows(F.silu(gate_PF) * up_PF * weights_P[:, None], None, False)[0], codes


def gate_backward(
    gate_up_PH: BlockScaled, weights_P: torch.Tensor, gradient_PF: torch.Tensor, with_transposed: bool
) -> tuple[BlockScaled | None, BlockScaled, BlockScaled | None, torch.Tensor]:
    """Implement `Float8Functions.gate_backward`."""
    gate_PF, up_PF = gate_up_PH.dequantize(torch.float32).chunk(2, dim=-1)
    sigmoid_PF, wide_PF = gate_PF.sigmoid(), gradient_PF.float()
    silu_PF = gate_PF * sigmoid_PF
    hidden_PF = silu_PF * up_PF
    weights_gradient_P = (wide_PF * hidden_PF).sum(dim=1)
    wide_PF = wide_PF * weights_P[:, None]
    gradient_PH = torch.cat([wide_PF * up_PF * (sigmoid_PF + silu_PF * (1 - sigmoid_PF)), wide_PF * silu_PF], dim=-1)
    hidden = quantize_rows((hidden_PF * weights_P[:, None]).T, None, False)[0] if with_transposed else None
    return hidden, *quantize_rows(gradient_PH, None, with_transposed), weights_gradient_P


def _sum_of_blocks(left_MK: BlockScaled, right_NK: BlockScaled) -> torch.Tensor:
    """Return left @ right.T, float32 [M, N]: the product of the codes of each 128 summed dims, times both scales.

    A product of two codes is exact in float32.
    """
    (M, K), N = left_MK.shape, right_NK.shape[0]
    total_MN = torch.zeros(M, N, device=left_MK.codes.device)
    right_rows = torch.arange(N, device=total_MN.device) // right_NK.block[0]
    step = min(left_MK.block[1], right_NK.block[1])
    for start in range(0, K, step):
        part = slice(start, start + step)
        product_MN = left_MK.codes[:, part].float() @ right_NK.codes[:, part].float().T
        product_MN *= left_MK.scales[:, start // left_MK.block[1], None]
        product_MN *= right_NK.scales[right_rows, start // right_NK.block[1]]
        total_MN = total_MN.add_(product_MN) if start else product_MN
    return total_MN


def _columns(matrix: BlockScaled, start: int, stop: int) -> BlockScaled:
    """Return columns from one multiple of 128 to another one, or to the end."""
    scales = matrix.scales[:, start // FP8_BLOCK : -(-stop // FP8_BLOCK)]
    return BlockScaled(matrix.codes[:, start:stop], scales, matrix.block)


def _ranges(ends_E: torch.Tensor | None, num_rows: int) -> list[tuple[int, int]]:
    ends = [num_rows] if ends_E is None else ends_E.tolist()
    return list(zip([0, *ends], ends, strict=False))


FUNCTIONS = Float8Functions(quantize_rows, quantize_weight, multiply, weight_gradient, gate, gate_backward)
PLUGIN = Backend(priority=0, run=FUNCTIONS, refuse=lambda need: None)
