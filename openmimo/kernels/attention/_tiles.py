"""Tiles of attention, shared by the tiled backends: a block of queries against all keys that any of them may see.

The R = N / G query heads that read one key/value head are folded into the rows of the tile. A tile is then two plain
matrix products per key/value head, and keys are never repeated. With B = 3 queries and R = 2, the logits of a tile are

                         key 0   key 1   ...   sink
    head 0   query 0
             query 1
             query 2
    head 1   query 0             [M, C]
             query 1
             query 2

The sink is one more column: a zero key with a zero value, whose logit is overwritten. The softmax and its gradient then
need no special case. The backward pass keeps no probabilities; it recomputes them from queries and keys.

The number of columns is rounded up to a multiple of `COLUMNS_MULTIPLE` with masked keys. On a CPU, oneDNN compiles a
bfloat16 product for each new size, which takes longer than a small product itself.

Logits and probabilities have the dtype of the inputs; the softmax between them computes in float32 or better.

J tiles, B queries of a tile, M = R x B rows of a tile, C columns of a tile (its keys, then the sink if there is one),
N query heads, G key/value heads, R = N / G, K key dim, V value dim, X either of these. A tile of one key/value head is
one entry of a batch of matrix products: L = J x G.
"""

import torch
import torch.nn.functional as F

COLUMNS_MULTIPLE = 64


def whole_columns(count: int) -> int:
    """Return `count` rounded up to a multiple of `COLUMNS_MULTIPLE`."""
    return -(-count // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE


def pack_rows(x_TNX: torch.Tensor, *, block: int, num_kv_heads: int) -> torch.Tensor:
    """Fold [T, N, X] to [L, M, X], with `block` = B; zeros fill the last tile.

    Rows run over the query heads of a key/value head first and over queries second.
    """
    T, N, X = x_TNX.shape
    if T % block:
        x_TNX = F.pad(x_TNX, (0, 0, 0, 0, 0, -T % block))
    x_JBGRX = x_TNX.reshape(-1, block, num_kv_heads, N // num_kv_heads, X)
    return x_JBGRX.permute(0, 2, 3, 1, 4).reshape(-1, N // num_kv_heads * block, X)


def unpack_rows(x_LMX: torch.Tensor, out_TNX: torch.Tensor, *, block: int, num_kv_heads: int) -> None:
    """Invert `pack_rows`, writing all of `out_TNX`."""
    L, M, X = x_LMX.shape
    x_JGRBX = x_LMX.view(L // num_kv_heads, num_kv_heads, M // block, block, X)
    x_JBGRX = x_JGRBX.permute(0, 3, 1, 2, 4)
    if len(out_TNX) % block:
        out_TNX.copy_(x_JBGRX.reshape(-1, *out_TNX.shape[1:])[: len(out_TNX)])
    else:
        out_TNX.view(x_JBGRX.shape).copy_(x_JBGRX)


def scaled_product(a_LMX: torch.Tensor, b_LXC: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * a b, [L, M, C]."""
    ignored = a_LMX.new_empty(1, 1, 1)  # beta=0: never read
    return torch.baddbmm(ignored, a_LMX, b_LXC, beta=0, alpha=scale)


def write_sink(logits_LMC: torch.Tensor, sink_N: torch.Tensor, *, block: int, num_kv_heads: int) -> None:
    """Overwrite the last column of the logits with the sink of each row's query head."""
    L, M, C = logits_LMC.shape
    logits_JGRBC = logits_LMC.view(L // num_kv_heads, num_kv_heads, M // block, block, C)
    logits_JGRBC[..., -1] = sink_N.view(num_kv_heads, -1, 1)


def sink_gradient(grad_logits_LMC: torch.Tensor, *, block: int, num_kv_heads: int) -> torch.Tensor:
    """Return the gradient of the sinks [N], in float32 or better, from the gradient of the logits."""
    L, M, _ = grad_logits_LMC.shape
    grad_JNB = grad_logits_LMC[:, :, -1].reshape(L // num_kv_heads, num_kv_heads * (M // block), block)
    return grad_JNB.to(wide_dtype(grad_JNB.dtype)).sum(dim=(0, 2))


def logits_gradient(probabilities_LMC: torch.Tensor, v_LCV: torch.Tensor, grad_out_LMV: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the logits, [L, M, C]."""
    grad_LMC = torch.bmm(grad_out_LMV, v_LCV.transpose(1, 2))
    return torch._softmax_backward_data(grad_LMC, probabilities_LMC, -1, probabilities_LMC.dtype)


def chosen_mask(ids_TGJ: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Return whether each query reads each of the `num_blocks` blocks, bool [T, G, num_blocks]."""
    T, G, _ = ids_TGJ.shape
    mask = torch.zeros(T, G, num_blocks + 1, dtype=torch.bool, device=ids_TGJ.device)
    return mask.scatter_(2, ids_TGJ + 1, True)[..., 1:]  # entries of -1 set the column that is cut off


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are summed over tiles: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
