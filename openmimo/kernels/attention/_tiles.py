"""What the tiled backends share: a tile is some queries against the keys that any of them may see.

The R = N / G query heads that read one key/value head are folded into the rows of the tile, so a tile is two plain
matrix products and keys are never repeated. A sink is one more column: a zero key whose logit is then overwritten and
a zero value, which makes its share of the softmax, and of the gradient, come out by itself.

Logits and probabilities are held in the dtype of the inputs; the softmax between them computes in float32 or better.

J tiles, M rows of a tile (R x B), B queries of a tile, C columns of a tile (its keys, then the sink if there is one),
N query heads, G key/value heads, R = N / G, K key dim, V value dim. X is any feature dim.
"""

import torch
import torch.nn.functional as F


def pack_rows(x_TNX: torch.Tensor, *, num_tiles: int, num_kv_heads: int) -> torch.Tensor:
    """[J * B, N, X] to [J * G, R * B, X]: the rows of tile j and head group g are together, query head by query head."""
    length, N, X = x_TNX.shape
    x_JBGRX = x_TNX.reshape(num_tiles, length // num_tiles, num_kv_heads, N // num_kv_heads, X)
    return x_JBGRX.permute(0, 2, 3, 1, 4).reshape(num_tiles * num_kv_heads, -1, X)


def unpack_rows(x_JMX: torch.Tensor, *, num_tiles: int, num_heads: int) -> torch.Tensor:
    """The inverse of `pack_rows`, as a view [J, B, N's parts G and R, X] that is not contiguous."""
    groups, rows, X = x_JMX.shape
    num_kv_heads = groups // num_tiles
    x_JGRBX = x_JMX.view(num_tiles, num_kv_heads, num_heads // num_kv_heads, -1, X)
    return x_JGRBX.permute(0, 3, 1, 2, 4)
