"""Triton kernels around the grouped products of the experts in training, in the order of `triton_training`.

A visit is a token with one of its experts: visit m is token m // A. `row_M` gives the row of each visit in the order of
the experts. Every output has one writer, and sums run in a fixed order, so results are deterministic. T tokens,
M visits, A active experts a token, D model dim, F expert hidden dim, H = 2F.

Not yet run on a GPU: tested in Triton's interpreter, compiled for sm_90a (docs/log.md).
"""

import torch
import triton
import triton.language as tl

COPY_NUMBERS = 2048
SUM_NUMBERS = 1024
GATE_NUMBERS = 1024


def spread_rows(x_TD: torch.Tensor, row_M: torch.Tensor) -> torch.Tensor:
    """Copy the row of each token to the rows of its visits, [M, D]. A token is read once."""
    (T, D), M = x_TD.shape, row_M.numel()
    rows_MD = x_TD.new_empty(M, D)
    block = min(COPY_NUMBERS, triton.next_power_of_2(D))
    _spread[(T, triton.cdiv(D, block))](x_TD.contiguous(), row_M, rows_MD, D, A=M // T, BLOCK=block)
    return rows_MD


def sum_rows(rows_MD: torch.Tensor, row_M: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Sum the rows of each token's visits, [T, D], in the order of its experts and in float32."""
    M, D = rows_MD.shape
    out_TD = rows_MD.new_empty(num_tokens, D)
    block = min(SUM_NUMBERS, triton.next_power_of_2(D))
    _sum[(num_tokens, triton.cdiv(D, block))](rows_MD, row_M, out_TD, D, A=M // num_tokens, BLOCK=block)
    return out_TD


def gate_backward(
    gate_up_MH: torch.Tensor, grad_MF: torch.Tensor, row_M: torch.Tensor, weights_TA: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The backward pass of weight * silu(gate) * up. `grad_MF` is overwritten by these products.

    Args:
        gate_up_MH: Rows of gate and up.
        grad_MF: For each row, the gradient of the layer's output times the down weights. It lacks the weight.
        row_M: The row of each visit.
        weights_TA: The weight of each visit.

    Returns:
        The gradients of the rows [M, H] and of the weights [T, A].
    """
    M, H = gate_up_MH.shape
    grad_rows_MH, grad_weights_TA = torch.empty_like(gate_up_MH), torch.empty_like(weights_TA)
    block = min(GATE_NUMBERS, triton.next_power_of_2(H // 2))
    _gate_backward[(M,)](
        gate_up_MH, grad_MF, row_M, weights_TA, grad_rows_MH, grad_weights_TA, H // 2, BLOCK=block
    )  # fmt: skip
    return grad_rows_MH, grad_weights_TA


@triton.jit
def _spread(x, row_of_visit, rows, D, A: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(x + token * D + dims, mask=dims < D)
    for place in tl.static_range(A):
        row = tl.load(row_of_visit + token * A + place).to(tl.int64)
        tl.store(rows + row * D + dims, numbers, mask=dims < D)


@triton.jit
def _sum(rows, row_of_visit, out, D, A: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(A):
        row = tl.load(row_of_visit + token * A + place).to(tl.int64)
        total += tl.load(rows + row * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + dims, total.to(out.dtype.element_ty), mask=dims < D)


@triton.jit
def _gate_backward(gate_up, grad, row_of_visit, weights, grad_gate_up, grad_weights, F, BLOCK: tl.constexpr):
    visit = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of_visit + visit).to(tl.int64)
    weight = tl.load(weights + visit).to(tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        dims = start + tl.arange(0, BLOCK)
        is_dim = dims < F
        gate = tl.load(gate_up + row * 2 * F + dims, mask=is_dim, other=0.0).to(tl.float32)
        up = tl.load(gate_up + (row * 2 + 1) * F + dims, mask=is_dim, other=0.0).to(tl.float32)
        unweighted = tl.load(grad + row * F + dims, mask=is_dim, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        hidden = silu * up
        products += unweighted * hidden
        grad_hidden = weight * unweighted
        # d silu(g) / dg = sigmoid(g) (1 + g (1 - sigmoid(g))) = sigmoid(g) + silu(g) (1 - sigmoid(g))
        grad_gate = grad_hidden * up * (sigmoid + silu * (1.0 - sigmoid))
        dtype = grad_gate_up.dtype.element_ty
        tl.store(grad_gate_up + row * 2 * F + dims, grad_gate.to(dtype), mask=is_dim)
        tl.store(grad_gate_up + (row * 2 + 1) * F + dims, (grad_hidden * silu).to(dtype), mask=is_dim)
        tl.store(grad + row * F + dims, (weight * hidden).to(dtype), mask=is_dim)
    tl.store(grad_weights + visit, tl.sum(products).to(grad_weights.dtype.element_ty))
