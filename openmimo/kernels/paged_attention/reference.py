"""The definition: gathers the positions that the queries of each sequence may see, and calls `attend`.

It refuses nothing: prefill chunks with long pasts, every cache dtype, CPUs and accelerators. Shapes as in the package.
"""

import torch

from openmimo.kernels.attention import AttentionOut, ChosenBlocks, Pages, attend, read_rows
from openmimo.kernels.dispatch import Backend


def run(
    q_TNK: torch.Tensor,
    pages: Pages,
    sink_N: torch.Tensor | None,
    *,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    longest_query: int,
    longest_key: int,
    window_keys: int | None,
    score_block: int | None = None,
    blocks: ChosenBlocks | None = None,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.paged_attend`."""
    query_lengths, key_lengths = tuple(query_lengths_B.tolist()), tuple(key_lengths_B.tolist())
    first = [
        0 if window_keys is None else max(0, keys - queries - window_keys + 1)
        for queries, keys in zip(query_lengths, key_lengths, strict=True)
    ]
    rows_S = _rows(pages, first, key_lengths).to(q_TNK.device)
    return attend(
        q_TNK,
        _gather(pages.keys_XPGK, rows_S, q_TNK.dtype),
        _gather(pages.values_XPGV, rows_S, q_TNK.dtype),
        sink_N,
        query_lengths=query_lengths,
        key_lengths=tuple(keys - begin for begin, keys in zip(first, key_lengths, strict=True)),
        window_keys=window_keys,
        score_block=score_block,
        blocks=blocks,
    )


def _rows(pages: Pages, first: list[int], key_lengths: tuple[int, ...]) -> torch.Tensor:
    """Return the index in the flattened cache of each position from `first` of its sequence on, int64 [S]."""
    page_positions = pages.keys_XPGK.shape[1]
    device = pages.tables_BY.device
    rows = []
    for table_Y, begin, end in zip(pages.tables_BY, first, key_lengths, strict=True):
        positions = torch.arange(begin, end, device=device)
        page = table_Y[positions // page_positions].long()
        rows.append(page * page_positions + positions % page_positions)
    return torch.cat(rows)


def _gather(x_XPGK: torch.Tensor, rows_S: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return keys or values at the indices `rows_S`, [S, G, K], converted to `dtype`."""
    page_positions = x_XPGK.shape[1]
    return read_rows(x_XPGK[rows_S // page_positions, rows_S % page_positions], dtype)


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
