"""Attention of an audio stack: a position sees `left` earlier and `right` later ones.

B sequences of equal length, Q queries, S keys, N heads, K head dim, L positions, D model dim.

Causal and unlimited windows use the attention kernels. A window with different sides is none of their cases, so it is
computed here through torch's call, in tiles of queries: the memory of a tile is bounded, and so is its key range.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from openmimo.core.errors import ConfigError
from openmimo.kernels.attention import attend
from openmimo.kernels.operations import apply_rotary, rotary_table
from openmimo.model.audio.config import StackConfig
from openmimo.model.layers import Linear

_TILE_QUERIES = 256
_FEWEST_ROWS = 64  # rows of a new key buffer


def attend_window(
    q_BQNK: torch.Tensor,
    k_BSNK: torch.Tensor,
    v_BSNK: torch.Tensor,
    *,
    first_query: int,
    left: int | None,
    right: int | None,
) -> torch.Tensor:
    """Compute attention within a window. Returns [B, Q, N, K]. Differentiable.

    Args:
        q_BQNK: Queries; query i is at key `first_query` + i.
        k_BSNK: Keys.
        v_BSNK: Values.
        first_query: Key index of the first query.
        left: Earlier keys that a query sees (None: all).
        right: Later keys that a query sees (None: all).
    """
    B, Q, N, K = q_BQNK.shape
    S = k_BSNK.shape[1]
    is_causal = right == 0 and first_query + Q == S
    if is_causal or (left is None and right is None):
        out = attend(
            q_BQNK.reshape(B * Q, N, K),
            k_BSNK.reshape(B * S, N, K),
            v_BSNK.reshape(B * S, N, K),
            None,
            query_lengths=(Q,) * B,
            key_lengths=(S,) * B,
            window_keys=None if left is None else left + 1,
            causal=is_causal,
        )
        return out.out_TNV.view(B, Q, N, K)
    return torch.cat(
        [
            _attend_tile(q_BQNK, k_BSNK, v_BSNK, range(start, min(start + _TILE_QUERIES, Q)), first_query, left, right)
            for start in range(0, Q, _TILE_QUERIES)
        ],
        dim=1,
    )


def _attend_tile(
    q_BQNK: torch.Tensor,
    k_BSNK: torch.Tensor,
    v_BSNK: torch.Tensor,
    queries: range,
    first_query: int,
    left: int | None,
    right: int | None,
) -> torch.Tensor:
    """Compute attention of some queries, with the keys that any of them sees."""
    S, device = k_BSNK.shape[1], q_BQNK.device
    first_key = 0 if left is None else max(0, first_query + queries.start - left)
    end_key = S if right is None else min(S, first_query + queries.stop + right)
    key_S = torch.arange(first_key, end_key, device=device)
    position_Q1 = torch.arange(queries.start, queries.stop, device=device)[:, None] + first_query
    seen_QS = torch.ones(len(queries), len(key_S), dtype=torch.bool, device=device)
    if left is not None:
        seen_QS &= key_S >= position_Q1 - left
    if right is not None:
        seen_QS &= key_S <= position_Q1 + right
    keys, values = (x_BSNK[:, first_key:end_key].transpose(1, 2) for x_BSNK in (k_BSNK, v_BSNK))
    q_BNQK = q_BQNK[:, queries.start : queries.stop].transpose(1, 2)
    return F.scaled_dot_product_attention(q_BNQK, keys, values, attn_mask=seen_QS).transpose(1, 2)


Rotation = tuple[torch.Tensor, torch.Tensor]


def rotation(config: StackConfig, theta: float, positions: range, like: torch.Tensor) -> Rotation:
    """Return cos and sin of the rotary positions, in dtype and device of `like`."""
    positions_L = torch.arange(positions.start, positions.stop, device=like.device)
    return rotary_table(positions_L, config.head_dim, theta, like.dtype)


@dataclass
class LayerState:
    """What a streamed layer remembers: keys and values that later queries see, and positions that wait for later keys.

    Attributes:
        first_key: Position of the first kept key.
        num_keys: Number of kept keys.
        keys: Buffer of keys and values, [2, rows, N, K], of which the first `num_keys` rows are in use.
        waiting: States and queries of positions whose later keys are not known yet.
    """

    first_key: int = 0
    num_keys: int = 0
    keys: torch.Tensor | None = None
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def append(self, k_BSNK: torch.Tensor, v_BSNK: torch.Tensor) -> None:
        """Add keys and values. The buffer doubles when it is full, so that a stream copies each row a few times."""
        new = torch.stack([k_BSNK[0], v_BSNK[0]])
        needed = self.num_keys + new.shape[1]
        if self.keys is None or needed > self.keys.shape[1]:
            buffer = new.new_empty(2, max(2 * needed, _FEWEST_ROWS), *new.shape[2:])
            if self.keys is not None:
                buffer[:, : self.num_keys] = self.keys[:, : self.num_keys]
            self.keys = buffer
        self.keys[:, self.num_keys : needed] = new
        self.num_keys = needed

    def forget(self, before: int) -> None:
        """Drop the keys of positions before `before`, when they are at least half of the buffer."""
        dropped = before - self.first_key
        if self.keys is None or dropped * 2 < self.keys.shape[1]:
            return
        self.keys = self.keys[:, dropped : self.num_keys].clone()
        self.first_key, self.num_keys = before, self.num_keys - dropped


class AudioAttention(nn.Module):
    """Multi-head attention with rotary positions; the key projection has no bias.

    Args:
        config: The stack's shape.
    """

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        self.q_proj = Linear(config.dim, config.dim)
        self.k_proj = Linear(config.dim, config.dim, bias=False)
        self.v_proj = Linear(config.dim, config.dim)
        self.out_proj = Linear(config.dim, config.dim)

    def project(self, x_BLD: torch.Tensor, turn: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries and keys, and values, each [B, L, N, K]."""
        B, L = x_BLD.shape[:2]
        N, K = self.config.num_heads, self.config.head_dim
        cos, sin = (table.repeat(B, 1) for table in turn)
        q, k = (apply_rotary(part(x_BLD).view(B * L, N, K), cos, sin) for part in (self.q_proj, self.k_proj))
        return q.view(B, L, N, K), k.view(B, L, N, K), self.v_proj(x_BLD).view(B, L, N, K)

    def forward(self, x_BLD: torch.Tensor, turn: Rotation) -> torch.Tensor:
        """Return the output of whole sequences."""
        q, k, v = self.project(x_BLD, turn)
        out = attend_window(
            q, k, v, first_query=0, left=self.config.left_positions, right=self.config.right_positions
        )  # fmt: skip
        return self.out_proj(out.flatten(2))


class AudioLayer(nn.Module):
    """A layer with norms before attention and before the feed-forward network.

    Args:
        config: The stack's shape.
    """

    def __init__(self, config: StackConfig):
        super().__init__()
        self.self_attn = AudioAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.fc1 = Linear(config.dim, config.ffn_dim)
        self.fc2 = Linear(config.ffn_dim, config.dim)
        self.final_layer_norm = nn.LayerNorm(config.dim)

    def forward(self, x_BLD: torch.Tensor, turn: Rotation) -> torch.Tensor:
        """Return the output for whole sequences."""
        return self._add_ffn(x_BLD + self.self_attn(self.self_attn_layer_norm(x_BLD), turn))

    def push(self, x_BLD: torch.Tensor, turn: Rotation, state: LayerState, *, last: bool) -> torch.Tensor:
        """Return the outputs that the next states of one stream (B is 1) complete; `last`: no states follow."""
        attention, config = self.self_attn, self.self_attn.config
        assert config.right_positions is not None
        if x_BLD.shape[1]:
            q, k, v = attention.project(self.self_attn_layer_norm(x_BLD), turn)
            state.append(k, v)
            state.waiting.append((x_BLD, q))
        if not state.waiting:
            return x_BLD
        x_BLD, q = (torch.cat(parts, dim=1) for parts in zip(*state.waiting, strict=True))
        ready = max(0, q.shape[1] - (0 if last else config.right_positions))
        state.waiting = [(x_BLD[:, ready:], q[:, ready:])]
        if ready == 0:
            return x_BLD[:, :0]
        assert state.keys is not None
        keys, values = state.keys[:, None, : state.num_keys].unbind(0)
        first_query = state.num_keys - q.shape[1]
        out = attend_window(
            q[:, :ready], keys, values, first_query=first_query, left=config.left_positions,
            right=config.right_positions,
        )  # fmt: skip
        if config.left_positions is not None:
            state.forget(max(state.first_key, state.first_key + first_query + ready - config.left_positions))
        return self._add_ffn(x_BLD[:, :ready] + attention.out_proj(out.flatten(2)))

    def _add_ffn(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return x_BLD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_BLD))))


class LayerStream:
    """The layers of one stream. With a right window, each layer holds back as many positions as it sees later ones.

    Args:
        layers: The layers.
        config: Their shape.
        theta: Base of the rotary positions.

    Raises:
        ConfigError: A position sees all later ones, so no output is complete before the end.
    """

    def __init__(self, layers: nn.ModuleList, config: StackConfig, theta: float):
        if config.right_positions is None:
            raise ConfigError(
                "these layers see all later positions, so they cannot be streamed; decode whole sequences."
            )
        self._layers = cast(list[AudioLayer], list(layers))
        self._config, self._theta = config, theta
        self._states = [LayerState() for _ in layers]
        self._starts = [0] * len(layers)

    def push(self, x_BLD: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """Return the outputs that the next states complete. With `last`, all outputs are complete."""
        for index, layer in enumerate(self._layers):
            start = self._starts[index]
            turn = rotation(self._config, self._theta, range(start, start + x_BLD.shape[1]), x_BLD)
            self._starts[index] += x_BLD.shape[1]
            x_BLD = layer.push(x_BLD, turn, self._states[index], last=last)
        return x_BLD
