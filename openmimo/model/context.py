"""What a forward pass needs beside the tokens: where they stand, what they may attend to, where they are routed.

`model(tokens_T, context)` works on packed tokens [T]; every attention layer calls `context.attend(...)`. The model
never asks whether a cache exists: `PackedContext` (training, scoring) attends within each document; the engine's
context writes and reads a cache behind the same call. Nothing is global, so several models live in one process.

T packed tokens, N query heads, G key/value heads, K key dim, V value dim, A active experts.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from openmimo.kernels.attention import attend
from openmimo.kernels.rotary import rotary_table
from openmimo.model.config import AttentionConfig


@dataclass
class RoutingTape:
    """Which experts each token visits, by layer: recorded from one pass, replayed in another (R3, paper section 4.6.1).

    record: keep the chosen ids, int64 [T, A], in `recorded`. replayed: ids to use instead of the router's own choice;
    a row of -1 falls back to it. The gate weights are always computed from the current scores, so the router learns.
    """

    record: bool = False
    recorded: dict[int, torch.Tensor] = field(default_factory=dict)
    replayed: dict[int, torch.Tensor] = field(default_factory=dict)


class AttentionContext(Protocol):
    """What the model asks of a context."""

    positions_T: torch.Tensor
    routing: RoutingTape
    sequence_balance: "SequenceBalance | None"

    def rotary(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, rotary_dim] of the tokens' positions, in `dtype`."""
        ...

    def attend(
        self,
        layer: int,
        spec: AttentionConfig,
        q_TNK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGV: torch.Tensor,
        sink_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention output [T, N, V] of layer `layer`; MTP head h is layer `num_layers + h`."""
        ...


@dataclass(frozen=True)
class SequenceBalance:
    """The sequence-level balance loss of a training pass: its weight, and which sequence each token belongs to."""

    weight: float
    sequence_T: torch.Tensor
    num_sequences: int


class RotaryTables:
    """The rotation tables of one pass: computed once per RoPE base, shared by its layers."""

    def __init__(self, positions_T: torch.Tensor):
        self.positions_T = positions_T
        self._tables: dict[tuple[int, float, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def get(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, rotary_dim] for the geometry of `spec`."""
        key = (spec.rotary_dim, spec.rope_theta, dtype)
        if key not in self._tables:
            self._tables[key] = rotary_table(self.positions_T, spec.rotary_dim, spec.rope_theta, dtype)
        return self._tables[key]


class PackedContext:
    """Documents packed one after another; each token sees its own document only. Nothing is remembered.

    document_lengths: tokens of each document, in order. balance_weight: weight of the sequence-level balance loss
    (paper section 3.1), added to the gradients of the router; 0 for none. balance_length: tokens of a sequence of that
    loss, which is a whole training row in DeepSeek-V3 (None: each document is a sequence).
    """

    def __init__(
        self,
        document_lengths: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        routing: RoutingTape | None = None,
        balance_weight: float = 0.0,
        balance_length: int | None = None,
    ):
        self.document_lengths = document_lengths
        lengths = torch.tensor(document_lengths)
        starts = torch.cumsum(lengths, 0) - lengths
        index = torch.repeat_interleave(torch.arange(len(document_lengths)), lengths)
        self.positions_T = (torch.arange(int(lengths.sum())) - starts[index]).to(device)
        self.routing = routing or RoutingTape()
        self.sequence_balance = None
        if balance_weight > 0.0:
            rows_T = index if balance_length is None else torch.arange(len(index)) // balance_length
            self.sequence_balance = SequenceBalance(balance_weight, rows_T.to(device), int(rows_T[-1]) + 1)
        self._rotary = RotaryTables(self.positions_T)

    def rotary(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """See AttentionContext."""
        return self._rotary.get(spec, dtype)

    def attend(
        self,
        layer: int,
        spec: AttentionConfig,
        q_TNK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGV: torch.Tensor,
        sink_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """See AttentionContext."""
        lengths = self.document_lengths
        return attend(
            q_TNK, k_TGK, v_TGV, sink_N, query_lengths=lengths, key_lengths=lengths, window_keys=spec.window_keys
        )
