"""The engine's attention context: packed new tokens of several sequences, each reading and writing its own cache.

T packed new tokens, N query heads, G key/value heads, K key dim, V value dim, R rotated dims.
"""

import torch

from openmimo.engine.cache import KVCache
from openmimo.kernels.attention import attend
from openmimo.kernels.rotary import rotary_table
from openmimo.model.config import AttentionConfig
from openmimo.model.context import RoutingTape

_FIRST_POSITIONS = 512
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
            positions = torch.arange(max(_FIRST_POSITIONS, 2 * length), device=self.device)
            tables = rotary_table(positions, spec.rotary_dim, spec.rope_theta, dtype)
            self._tables[geometry] = tables
        return tables


class CachedContext:
    """An AttentionContext (see `openmimo.model.context`) over caches: `new_lengths[b]` new tokens of sequence b.

    first_layer: the layer whose length tells where the new tokens stand. The main model and each MTP head stand
    elsewhere, so each of their passes has a context of its own.
    """

    def __init__(
        self,
        caches: list[KVCache],
        new_lengths: tuple[int, ...],
        *,
        first_layer: int,
        rotary: RotaryRows,
    ):
        self.routing = RoutingTape()
        self.sequence_balance = None
        self._caches = caches
        self._new_lengths = new_lengths
        starts = [cache.length(first_layer) for cache in caches]
        spans = [range(start, start + length) for start, length in zip(starts, new_lengths, strict=True)]
        self.positions_T = torch.tensor([position for span in spans for position in span], device=rotary.device)
        self._table_length = max(span.stop for span in spans)
        self._table_rows = slice(spans[0].start, spans[0].stop) if len(spans) == 1 else self.positions_T
        self._rotary = rotary
        self._picked: dict[_Geometry, tuple[torch.Tensor, torch.Tensor]] = {}

    def rotary(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, R] of the new tokens."""
        geometry = (spec.rotary_dim, spec.rope_theta, dtype)
        if geometry not in self._picked:
            cos, sin = self._rotary.tables(spec, dtype, self._table_length)
            self._picked[geometry] = (cos[self._table_rows], sin[self._table_rows])
        return self._picked[geometry]

    def attend(
        self,
        layer: int,
        spec: AttentionConfig,
        q_TNK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGV: torch.Tensor,
        sink_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention output [T, N, V] over what each cache kept and the new tokens, which it remembers."""
        if len(self._caches) == 1:
            k_SGK, v_SGV = self._caches[0].append(layer, k_TGK, v_TGV)
            key_lengths = (k_SGK.shape[0],)
        else:
            news = zip(self._caches, k_TGK.split(self._new_lengths), v_TGV.split(self._new_lengths), strict=True)
            keys, values = zip(*(cache.append(layer, k, v) for cache, k, v in news), strict=True)
            key_lengths = tuple(len(k) for k in keys)
            k_SGK, v_SGV = torch.cat(keys), torch.cat(values)
        return attend(
            q_TNK,
            k_SGK,
            v_SGV,
            sink_N,
            query_lengths=self._new_lengths,
            key_lengths=key_lengths,
            window_keys=spec.window_keys,
        )
