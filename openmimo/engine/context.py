"""The engine's attention context: packed new tokens of several sequences, each reading and writing its own pages.

T packed new tokens, S keys, N query heads, G key/value heads, K key dim, V value dim, R rotated dims, B sequences, Y
pages of a table.
"""

from typing import NamedTuple

import numpy as np
import torch

from openmimo.engine.cache import PageArena, PageTables
from openmimo.kernels.attention import AttentionOut, attend
from openmimo.kernels.paged_attention import Pages, paged_attend
from openmimo.kernels.paged_attention.store import store
from openmimo.kernels.rotary import rotary_table
from openmimo.model.context import AttentionCall, RoutingTape
from openmimo.model.geometry import AttentionConfig

_FIRST_POSITIONS = 512
_ROTARY_PIECE = 1 << 16
_MAX_SHORT_TOKENS = 16  # new tokens a sequence up to which a pass reads its keys in the pages
_Geometry = tuple[int, float, torch.dtype]


class RotaryRows:
    """Rotation tables of all positions seen so far, kept between passes: a pass only picks its rows."""

    def __init__(self, device: torch.device | str):
        self.device = device
        self._tables: dict[_Geometry, tuple[torch.Tensor, torch.Tensor]] = {}

    def tables(self, spec: AttentionConfig, dtype: torch.dtype, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [positions, R] of at least the positions below `length`."""
        geometry = (spec.rotary_dim, spec.rope_theta, dtype)
        tables = self._tables.get(geometry)
        if tables is None or tables[0].shape[0] < length:
            tables = self._grown(tables, spec, dtype, length)
            self._tables[geometry] = tables
        return tables

    def _grown(
        self, known: tuple[torch.Tensor, torch.Tensor] | None, spec: AttentionConfig, dtype: torch.dtype, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of at least twice the positions. Only new rows are computed, in pieces, which bounds temporary memory.

        Pieces are whole multiples of a size, so that every row is computed by the same vector instructions.
        """
        num_known = 0 if known is None else known[0].shape[0]
        stop = -(-max(length, 2 * num_known) // _FIRST_POSITIONS) * _FIRST_POSITIONS
        pieces = [] if known is None else [known]
        for start in range(num_known, stop, _ROTARY_PIECE):
            positions = torch.arange(start, min(start + _ROTARY_PIECE, stop), device=self.device)
            pieces.append(rotary_table(positions, spec.rotary_dim, spec.rope_theta, dtype))
        return torch.cat([cos for cos, _ in pieces]), torch.cat([sin for _, sin in pieces])


class Span(NamedTuple):
    """Positions `start` to `stop` of one sequence, new in a pass, and its pages."""

    pages: PageTables
    start: int
    stop: int


class _Placement(NamedTuple):
    """Where a pass writes and reads in one group of layers.

    rows: which new tokens have a page, if not all; page_T and slot_T: where these go. tables_BY: as in `Pages`.
    """

    rows: torch.Tensor | None
    page_T: torch.Tensor
    slot_T: torch.Tensor
    tables_BY: torch.Tensor


class _Keys(NamedTuple):
    """Keys and values of each sequence one after another, and how many each has."""

    k_SGK: torch.Tensor
    v_SGV: torch.Tensor
    lengths: tuple[int, ...]


class PagedContext:
    """An AttentionContext (see `openmimo.model.context`) over an arena: the new tokens of `spans`, packed in order.

    Passes of few tokens a sequence (decoding, verification) store their keys and read all where they lie. Longer ones
    (prefill) are computed from the new keys and a copy of what their layer still remembers of the past; of the new keys
    a sliding layer may store only the last.
    """

    def __init__(self, arena: PageArena, spans: list[Span], *, rotary: RotaryRows):
        self.routing = RoutingTape()
        self.sequence_balance = None
        self._arena = arena
        self._spans = spans
        self._lengths = tuple(span.stop - span.start for span in spans)
        self._stops = tuple(span.stop for span in spans)
        self._is_short = max(self._lengths) <= _MAX_SHORT_TOKENS
        if len(spans) == 1:
            self.positions_T = torch.arange(spans[0].start, spans[0].stop, device=rotary.device)
            self._table_rows = slice(spans[0].start, spans[0].stop)
        else:
            positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
            self.positions_T = self._table_rows = torch.from_numpy(positions).to(rotary.device)
        self._table_length = max(self._stops)
        self._rotary = rotary
        self._picked: dict[_Geometry, tuple[torch.Tensor, torch.Tensor]] = {}
        self._placements: dict[int, list[_Placement]] = {}
        self.block_scores: dict[int, torch.Tensor] = {}
        self._sources: dict[int, _Keys] = {}

    def rotary(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, R] of the new tokens."""
        geometry = (spec.rotary_dim, spec.rope_theta, dtype)
        if geometry not in self._picked:
            cos, sin = self._rotary.tables(spec, dtype, self._table_length)
            self._picked[geometry] = (cos[self._table_rows], sin[self._table_rows])
        return self._picked[geometry]

    def attend(self, call: AttentionCall) -> AttentionOut:
        """Attention over what each sequence remembers and the new tokens, which it remembers too."""
        owner = call.layer if call.source_layer is None else call.source_layer
        keys_XPGK, values_XPGV = self._arena.layer(owner)
        group, part = self._arena.place_of_layer[owner]
        placement = self._placement(group)[part]
        pages = Pages(keys_XPGK, values_XPGV, placement.tables_BY)
        if self._is_short and placement.rows is None:
            if call.k_TGK is not None and call.v_TGV is not None:
                self._store(placement, pages, call.k_TGK, call.v_TGV)
            result = paged_attend(
                call.q_TNK,
                pages,
                call.sink_N,
                query_lengths=self._lengths,
                key_lengths=self._stops,
                window_keys=call.window_keys,
                score_block=call.score_block,
            )
        else:
            keys = self._keys(call, placement, pages)
            result = attend(
                call.q_TNK,
                keys.k_SGK,
                keys.v_SGV,
                call.sink_N,
                query_lengths=self._lengths,
                key_lengths=keys.lengths,
                window_keys=call.window_keys,
                score_block=call.score_block,
            )
        if result.block_scores_TGC is not None:
            assert call.window_keys is None, "only a layer that sees every key scores blocks"
            self.block_scores[call.layer] = result.block_scores_TGC
        return result

    def _keys(self, call: AttentionCall, placement: _Placement, pages: Pages) -> _Keys:
        """What a long pass reads: the remembered past and the new tokens, which are stored. A source keeps its own."""
        if call.source_layer is not None:
            return self._sources[call.source_layer]
        assert call.k_TGK is not None and call.v_TGV is not None
        keys = self._with_past(pages, call.window_keys, call.k_TGK, call.v_TGV)
        self._store(placement, pages, call.k_TGK, call.v_TGV)
        if call.is_source:
            self._sources[call.layer] = keys
        return keys

    def _store(self, placement: _Placement, pages: Pages, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> None:
        if placement.rows is not None:
            k_TGK, v_TGV = k_TGK[placement.rows], v_TGV[placement.rows]
        store(pages, placement.page_T, placement.slot_T, k_TGK, v_TGV)

    def _with_past(self, pages: Pages, window_keys: int | None, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> _Keys:
        """Each sequence's remembered past followed by its new tokens."""
        if not any(span.start for span in self._spans):
            return _Keys(k_TGK, v_TGV, self._lengths)
        keys, values, key_lengths = [], [], []
        news = zip(self._spans, k_TGK.split(self._lengths), v_TGV.split(self._lengths), strict=True)
        for row, (span, k_new, v_new) in enumerate(news):
            first = 0 if window_keys is None else max(span.start - window_keys + 1, 0)
            positions = torch.arange(first, span.start, device=k_new.device)
            P = pages.keys_XPGK.shape[1]
            page, slot = pages.tables_BY[row][positions // P].long(), positions % P
            keys += [pages.keys_XPGK[page, slot].to(k_new.dtype), k_new]
            values += [pages.values_XPGV[page, slot].to(v_new.dtype), v_new]
            key_lengths.append(span.stop - first)
        return _Keys(torch.cat(keys), torch.cat(values), tuple(key_lengths))

    def _placement(self, group: int) -> list[_Placement]:
        if group not in self._placements:
            self._placements[group] = self._placed(group)
        return self._placements[group]

    def _placed(self, group: int) -> list[_Placement]:
        """The placement in each part of a group."""
        P = self._arena.layout.groups[group].page_positions
        tables = [span.pages.table(group) for span in self._spans]
        if len(tables) == 1:
            start, stop = self._spans[0].start, self._spans[0].stop
            tables_BYp = tables[0][None]
            positions = np.arange(start, stop)
            page_Tp = tables[0][positions // P]
        else:
            num_rows = max(len(table) for table in tables)
            tables_BYp = np.full((len(tables), num_rows, tables[0].shape[1]), -1, dtype=np.int32)
            for row, table in enumerate(tables):
                tables_BYp[row, : len(table)] = table
            positions = np.concatenate([np.arange(span.start, span.stop) for span in self._spans])
            page_Tp = tables_BYp[np.repeat(np.arange(len(tables)), self._lengths), positions // P]
        device = self._rotary.device
        rows = None
        if page_Tp.min() < 0:
            kept = np.flatnonzero(page_Tp[:, 0] >= 0)
            rows = torch.from_numpy(kept).to(device)
            positions, page_Tp = positions[kept], page_Tp[kept]
        # A head may have skipped positions that a window still covers, and that have no page. It reads page 0 there:
        # its draft may be worse for it, and no text is another.
        tables_pBY = torch.from_numpy(np.ascontiguousarray(tables_BYp.clip(min=0).transpose(2, 0, 1))).to(device)
        page_pT = torch.from_numpy(np.ascontiguousarray(page_Tp.T, dtype=np.int64)).to(device)
        slot_T = torch.from_numpy(positions % P).to(device)
        return [
            _Placement(rows, page_T, slot_T, tables_BY) for page_T, tables_BY in zip(page_pT, tables_pBY, strict=True)
        ]
