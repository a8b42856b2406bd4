"""Keys and values of one sequence, layer by layer: full layers keep every position, sliding layers only their window.

T new positions, S positions a call reads, G key/value heads, K key dim, V value dim.

Every layer's rows lie in order in one buffer, so a call always reads a contiguous view. A sliding layer's buffer has a
few rows of slack beside its window; when it is full, the window moves back to its start.
"""

from collections.abc import Sequence

import torch

from openmimo.model.attention import KVSpec, kv_spec
from openmimo.model.config import AttentionConfig

_FIRST_ROWS = 64
_LEAST_SLACK_ROWS = 16


class LayerCache:
    """One layer of one sequence.

    max_positions: the most positions it will ever see. slack_rows: how many rows beyond the window a sliding layer may
    hold, which is also how many of the newest can be taken back.
    """

    def __init__(
        self, spec: KVSpec, *, max_positions: int, slack_rows: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.keep_positions = max_positions if spec.keep_positions is None else spec.keep_positions
        self.max_rows = min(max_positions, self.keep_positions + slack_rows)
        self.max_positions = max_positions
        self.length = 0
        self._rows = 0
        self._keys_SGK = torch.empty(0, spec.num_kv_heads, spec.key_dim, dtype=dtype, device=device)
        self._values_SGV = torch.empty(0, spec.num_kv_heads, spec.value_dim, dtype=dtype, device=device)
        self._grow(min(self.max_rows, _FIRST_ROWS))

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self._keys_SGK.nbytes + self._values_SGV.nbytes

    @property
    def kept_positions(self) -> int:
        """How many of the latest positions are held."""
        return self._rows

    def append(self, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Remembers new positions. Returns what they read: the kept past and themselves, [S, G, K] and [S, G, V].

        The result is a view into the cache, good until the next call.
        """
        T = k_TGK.shape[0]
        past = min(self._rows, self.keep_positions)
        if self._rows + T > self._keys_SGK.shape[0]:
            if past + T > self.max_rows:
                return self._append_beyond_buffer(k_TGK, v_TGV)
            self._make_room(T)
        start, stop = self._rows, self._rows + T
        self._keys_SGK[start:stop] = k_TGK
        self._values_SGV[start:stop] = v_TGV
        self._rows = stop
        self.length += T
        return self._keys_SGK[start - past : stop], self._values_SGV[start - past : stop]

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on. Raises AssertionError if the window before them is gone."""
        rows = self._rows - (self.length - length)
        if length > self.length or rows < min(self.keep_positions, length):
            raise AssertionError(f"cannot go from {self.length} positions back to {length}: {self._rows} are held")
        self._rows = rows
        self.length = length

    def _append_beyond_buffer(self, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """More new rows than the buffer holds (prefill): they read a temporary, of which the last rows are kept."""
        if self.length + k_TGK.shape[0] > self.max_positions:
            raise AssertionError(f"a cache for {self.max_positions} positions cannot hold more")
        past = slice(self._rows - min(self._rows, self.keep_positions), self._rows)
        k_SGK = torch.cat([self._keys_SGK[past], k_TGK])
        v_SGV = torch.cat([self._values_SGV[past], v_TGV])
        self._rows = 0
        self._grow(self.max_rows)
        self._keys_SGK[:] = k_SGK[-self.max_rows :]
        self._values_SGV[:] = v_SGV[-self.max_rows :]
        self._rows = self.max_rows
        self.length += k_TGK.shape[0]
        return k_SGK, v_SGV

    def _make_room(self, new_rows: int) -> None:
        capacity = self._keys_SGK.shape[0]
        if capacity < self.max_rows:
            self._grow(min(self.max_rows, max(2 * capacity, self._rows + new_rows)))
        if self._rows + new_rows > self._keys_SGK.shape[0]:
            self._move_window_to_start()

    def _grow(self, capacity: int) -> None:
        self._keys_SGK = _grown(self._keys_SGK, capacity, self._rows)
        self._values_SGV = _grown(self._values_SGV, capacity, self._rows)

    def _move_window_to_start(self) -> None:
        past = min(self._rows, self.keep_positions)
        for buffer in (self._keys_SGK, self._values_SGV):
            buffer[:past] = buffer[self._rows - past : self._rows].clone()  # the two may overlap
        self._rows = past


def _grown(buffer: torch.Tensor, capacity: int, rows: int) -> torch.Tensor:
    grown = buffer.new_empty(capacity, *buffer.shape[1:])
    grown[:rows] = buffer[:rows]
    return grown


class KVCache:
    """All layers of one sequence: `layers` is `ModelConfig.attention_layers()`, the main layers and then the MTP heads.

    max_positions: the most positions the sequence will ever have. max_drafts: how many drafted tokens a verification
    may bring and take back. MTP heads lag behind the main layers, so each layer has its own length.
    """

    def __init__(
        self,
        layers: Sequence[AttentionConfig],
        *,
        max_positions: int,
        max_drafts: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        # In one round a head runs over the accepted drafts, the bonus token and the slots it redoes: 2 x drafts + 1.
        self._specs = tuple(layers)
        self._dtype = dtype
        slack_rows = max(_LEAST_SLACK_ROWS, 2 * max_drafts + 1)
        self.layers = [
            LayerCache(kv_spec(spec), max_positions=max_positions, slack_rows=slack_rows, dtype=dtype, device=device)
            for spec in layers
        ]

    def append(self, layer: int, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See LayerCache.append."""
        return self.layers[layer].append(k_TGK, v_TGV)

    def truncate(self, layer: int, length: int) -> None:
        """See LayerCache.truncate."""
        self.layers[layer].truncate(length)

    def length(self, layer: int) -> int:
        """How many positions layer `layer` has seen."""
        return self.layers[layer].length

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, all layers together."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def all_global_bytes(self) -> int:
        """Bytes for the positions of the first layer if every layer were full, see `all_global_cache_bytes`."""
        return all_global_cache_bytes(self._specs, self.layers[0].length, self._dtype)


def all_global_cache_bytes(layers: Sequence[AttentionConfig], num_positions: int, dtype: torch.dtype) -> int:
    """Bytes for `num_positions` if every one of `layers` were like the model's full layers (paper table 1).

    Without a full layer among them, each is counted with its own geometry, every position kept.
    """
    full = next((spec for spec in layers if kv_spec(spec).keep_positions is None), None)
    return num_positions * sum(kv_spec(full or spec).bytes_per_position(dtype.itemsize) for spec in layers)
