"""What the tiled backends share: a tile is some queries against the keys that any of them may see.

The R = N / G query heads that read one key/value head are folded into the rows of the tile, so a tile is two plain
matrix products and keys are never repeated. A sink is one more key: a zero key, whose logit is then overwritten, with
a zero value; its share of the softmax and of the gradient comes out by itself. Nothing of the softmax is kept for the
backward pass, which computes it again from queries and keys.

The number of columns is kept to multiples of `COLUMNS_MULTIPLE`, with keys that the mask hides: on a CPU, oneDNN
compiles each bfloat16 product anew for sizes that it has not seen, which takes longer than a small product.

Logits and probabilities are held in the dtype of the inputs; the softmax between them computes in float32 or better.

J tiles, B queries of a tile, M = R x B rows of a tile, C columns of a tile (its keys, then the sink if there is one),
N query heads, G key/value heads, R = N / G, K key dim, V value dim, X either of these. A tile of one key/value head is
one entry of a batch of matrix products: L = J x G.
"""

import torch
import torch.nn.functional as F

COLUMNS_MULTIPLE = 64


def whole_columns(count: int) -> int:
    """`count` rounded up to a multiple of `COLUMNS_MULTIPLE`."""
    return -(-count // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE


def pack_rows(x_TNX: torch.Tensor, *, block: int, num_kv_heads: int) -> torch.Tensor:
    """[T, N, X] to [L, M, X] with `block` = B; the rows of a tile run over query heads, then over queries.

    The last tile is filled up with zeros.
    """
    T, N, X = x_TNX.shape
    if T % block:
        x_TNX = F.pad(x_TNX, (0, 0, 0, 0, 0, -T % block))
    x_JBGRX = x_TNX.reshape(-1, block, num_kv_heads, N // num_kv_heads, X)
    return x_JBGRX.permute(0, 2, 3, 1, 4).reshape(-1, N // num_kv_heads * block, X)


def unpack_rows(x_LMX: torch.Tensor, out_TNX: torch.Tensor, *, block: int, num_kv_heads: int) -> None:
    """The inverse of `pack_rows`: writes all of `out_TNX`."""
    L, M, X = x_LMX.shape
    x_JGRBX = x_LMX.view(L // num_kv_heads, num_kv_heads, M // block, block, X)
    x_JBGRX = x_JGRBX.permute(0, 3, 1, 2, 4)
    if len(out_TNX) % block:
        out_TNX.copy_(x_JBGRX.reshape(-1, *out_TNX.shape[1:])[: len(out_TNX)])
    else:
        out_TNX.view(x_JBGRX.shape).copy_(x_JBGRX)


def scaled_product(a_LMX: torch.Tensor, b_LXC: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * a b, [L, M, C]."""
    unread = a_LMX.new_empty(1, 1, 1)
    return torch.baddbmm(unread, a_LMX, b_LXC, beta=0, alpha=scale)


def write_sink(logits_LMC: torch.Tensor, sink_N: torch.Tensor, *, block: int, num_kv_heads: int) -> None:
    """Overwrites the logits of the last column with the sink of each row's query head."""
    L, M, C = logits_LMC.shape
    logits_JGRBC = logits_LMC.view(L // num_kv_heads, num_kv_heads, M // block, block, C)
    logits_JGRBC[..., -1] = sink_N.view(num_kv_heads, -1, 1)


def sink_gradient(grad_logits_LMC: torch.Tensor, *, block: int, num_kv_heads: int) -> torch.Tensor:
    """Gradient of the sinks [N], float32 or better, from that of the logits."""
    L, M, _ = grad_logits_LMC.shape
    grad_JNB = grad_logits_LMC[:, :, -1].reshape(L // num_kv_heads, num_kv_heads * (M // block), block)
    return grad_JNB.to(wide_dtype(grad_JNB.dtype)).sum(dim=(0, 2))


def logits_gradient(probabilities_LMC: torch.Tensor, v_LCV: torch.Tensor, grad_out_LMV: torch.Tensor) -> torch.Tensor:
    """Gradient of the logits, [L, M, C]."""
    grad_LMC = torch.bmm(grad_out_LMV, v_LCV.transpose(1, 2))
    return torch._softmax_backward_data(grad_LMC, probabilities_LMC, -1, probabilities_LMC.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients are summed over tiles: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
