"""Inputs of a forward pass other than token ids: positions, attention, expert routing.

`model(tokens_T, context)` works on packed tokens [T], and every attention layer calls `context.attend(...)`. The model
does not know whether there is a cache: `PackedContext` (training, scoring) attends within each document, and the
engine's context writes and reads a cache in the same call. There is no global state, so one process can hold several
models.

T packed tokens, N query heads, G key/value heads, K key dim, V value dim, A active experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from openmimo.kernels.attention import AttentionOut, ChosenBlocks, FreshHeads, attend, rotated_heads
from openmimo.kernels.operations import count_experts, rotary_table
from openmimo.model.attention import AttentionConfig, Rotation
from openmimo.runtime.device import uploaded


@dataclass
class RoutingTape:
    """Expert ids of each token by layer, recorded in one pass and replayed in another (R3, paper section 4.6.1).

    The weights of the experts are always computed from the current scores, so the router still learns.

    Attributes:
        record: Whether to store the chosen ids in `recorded`.
        recorded: Chosen ids by layer, int64 [T, A].
        replayed: Ids by layer, int64 [T, A], that replace the router's choice, except in rows of -1.
    """

    record: bool = False
    recorded: dict[int, torch.Tensor] = field(default_factory=dict)
    replayed: dict[int, torch.Tensor] = field(default_factory=dict)

    def add_expert_load(self, load: dict[int, torch.Tensor], num_experts: int) -> None:
        """Add the recorded visits of each expert, int64 [experts], to the counts in `load` by layer."""
        for layer, ids_TA in self.recorded.items():
            counts = count_experts(ids_TA, num_experts)
            load[layer] = load[layer] + counts if layer in load else counts


class AttentionCall:
    """The arguments of one attention operation. A layer may call several times in one pass.

    A layer gives its queries, keys and values, or `fresh` heads. From these they are computed at first use. A context
    that hands the fresh heads to `kernels.attention.update_and_attend` computes them within that operation instead.

    Attributes:
        layer: Index of the layer under which its keys are stored; MTP head h is layer `num_layers + h`.
        fresh: Projected heads, or None.
        sink_N: Sink logits, or None.
        window_keys: Keys that a query sees, its own included (None: all).
        source_layer: An earlier layer of the pass, whose call had `is_source`.
        is_source: Whether a later layer of the pass reads these keys and values.
        score_block: Keys of a block, to request block scores of a call without a window (None: no scores).
        blocks: The blocks of keys that each query reads, of a call without a window (None: all).
    """

    __slots__ = (
        "_heads",
        "blocks",
        "fresh",
        "is_source",
        "layer",
        "score_block",
        "sink_N",
        "source_layer",
        "window_keys",
    )

    def __init__(
        self,
        layer: int,
        q_TNK: torch.Tensor | FreshHeads,
        k_TGK: torch.Tensor | None,
        v_TGV: torch.Tensor | None,
        sink_N: torch.Tensor | None,
        window_keys: int | None,
        source_layer: int | None = None,
        is_source: bool = False,
        score_block: int | None = None,
        blocks: ChosenBlocks | None = None,
    ):
        """
        Args:
            layer: See the attributes, also for the arguments that are not listed.
            q_TNK: Queries, rotated, or all heads before rotation.
            k_TGK: Keys, rotated; None to read those of `source_layer`, or with fresh heads.
            v_TGV: Values, scaled; None likewise.
            sink_N: See the attributes.
            window_keys: See the attributes.
            source_layer: See the attributes.
            is_source: See the attributes.
            score_block: See the attributes.
            blocks: See the attributes.
        """
        self.layer, self.sink_N, self.window_keys = layer, sink_N, window_keys
        self.source_layer, self.is_source, self.score_block = source_layer, is_source, score_block
        self.blocks = blocks
        self.fresh = q_TNK if isinstance(q_TNK, FreshHeads) else None
        self._heads = None if isinstance(q_TNK, FreshHeads) else (q_TNK, k_TGK, v_TGV)

    @property
    def q_TNK(self) -> torch.Tensor:  # noqa: N802
        """Queries, rotated."""
        return self.heads()[0]

    @property
    def k_TGK(self) -> torch.Tensor | None:  # noqa: N802
        """Keys, rotated; None to read those of `source_layer`."""
        return self.heads()[1]

    @property
    def v_TGV(self) -> torch.Tensor | None:  # noqa: N802
        """Values, scaled; None to read those of `source_layer`."""
        return self.heads()[2]

    def heads(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return queries, keys and values, as the properties do."""
        if self._heads is None:
            assert self.fresh is not None
            self._heads = rotated_heads(self.fresh)
        return self._heads


class AttentionContext(Protocol):
    """The interface of a context to the model.

    Attributes:
        positions_T: Position of each token in its sequence.
        routing: Recording and replay of the tokens' experts.
        router_loss: The losses of the routers in a training pass, or None.
        block_scores: Scores [T, G, C] by layer, see `AttentionOut`, of the layers that requested them in this pass.
        chosen_blocks: Blocks that sparse layers chose in this pass, by scored layer and number of keys, for all sparse
            layers that read the same.
    """

    positions_T: torch.Tensor
    routing: RoutingTape
    router_loss: "RouterLoss | None"
    block_scores: dict[int, torch.Tensor]
    chosen_blocks: dict[tuple[int, int], ChosenBlocks]

    def rotary(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [T, rotary_dim] of the tokens' positions, in `dtype`."""
        ...

    def attend(self, call: AttentionCall) -> AttentionOut:
        """Compute attention of the tokens to the keys that they see. Block scores are stored in `block_scores`."""
        ...


@dataclass(frozen=True)
class RouterLoss:
    """The losses of the routers in a training pass, whose gradient is added to that of the router.

    Attributes:
        balance_weight: Weight of the balance loss (paper section 3.1).
        sequence_T: Index of the sequence of each token.
        num_sequences: Number of sequences.
        sum_over_ranks: Sums a tensor over the processes that hold other tokens of the same sequences.
        z_weight: Weight of the mean square of the log-sum-exp of the logits (z-loss, arXiv 2202.08906).
        load_before: Visits of each expert, int64 [E], by layer, in the earlier micro-batches of this process. The
            balance loss then uses the frequencies of the whole batch so far (arXiv 2501.11873) and not of a sequence.
        sum_over_batch: Sums a tensor over the processes that hold other tokens of the batch.
    """

    balance_weight: float
    sequence_T: torch.Tensor
    num_sequences: int
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts
    z_weight: float = 0.0
    load_before: Mapping[int, torch.Tensor] | None = None
    sum_over_batch: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts


class SeenKeys(NamedTuple):
    """The keys and values of packed sequences.

    Attributes:
        k_SGK: Packed keys.
        v_SGV: Packed values.
        lengths: Keys of each sequence.
    """

    k_SGK: torch.Tensor
    v_SGV: torch.Tensor
    lengths: tuple[int, ...]


class RotaryTables:
    """The rotation tables of one pass, computed once for each geometry and shared by its layers."""

    def __init__(self, positions_T: torch.Tensor):
        self.positions_T = positions_T
        self._tables: dict[tuple[Rotation, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def get(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [T, rotary_dim] for the geometry of `spec`."""
        rotation = spec.rotation
        key = (rotation, dtype)
        if key not in self._tables:
            self._tables[key] = rotary_table(
                self.positions_T, rotation.rotary_dim, rotation.theta, dtype, rotation.divisors, rotation.amplitude
            )
        return self._tables[key]


class PackedContext:
    """Packed documents without a cache; each token sees its own document only.

    Args:
        document_lengths: Tokens of each document, in order.
        device: Device of the tokens.
        routing: Recording and replay of experts (None: neither).
        balance_weight: Weight of the sequence-level balance loss (paper section 3.1), whose gradient is added to that
            of the router; 0 for none.
        balance_length: Tokens of a sequence of that loss, which is a whole training row in DeepSeek-V3 (None: each
            document is a sequence).
        z_weight: Weight of the routers' z-loss, likewise.
    """

    def __init__(
        self,
        document_lengths: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        routing: RoutingTape | None = None,
        balance_weight: float = 0.0,
        balance_length: int | None = None,
        z_weight: float = 0.0,
    ):
        self.document_lengths = document_lengths
        lengths = torch.tensor(document_lengths)
        starts = torch.cumsum(lengths, 0) - lengths
        index = torch.repeat_interleave(torch.arange(len(document_lengths)), lengths)
        self.positions_T = uploaded(torch.arange(len(index)) - starts[index], torch.int64, device)
        self.routing = routing or RoutingTape()
        self.router_loss = None
        if balance_weight > 0.0 or z_weight > 0.0:
            rows_T = index if balance_length is None else torch.arange(len(index)) // balance_length
            num_rows = len(document_lengths) if balance_length is None else -(-len(index) // balance_length)
            self.router_loss = RouterLoss(
                balance_weight, uploaded(rows_T, torch.int64, device), num_rows, z_weight=z_weight
            )
        self.block_scores: dict[int, torch.Tensor] = {}
        self.chosen_blocks: dict[tuple[int, int], ChosenBlocks] = {}
        self._rotary = RotaryTables(self.positions_T)
        self._sources: dict[int, SeenKeys] = {}

    def rotary(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionContext.rotary`."""
        return self._rotary.get(spec, dtype)

    def attend(self, call: AttentionCall) -> AttentionOut:
        """As `AttentionContext.attend`."""
        seen = self._keys_and_values(call)
        result = attend(
            call.q_TNK,
            seen.k_SGK,
            seen.v_SGV,
            call.sink_N,
            query_lengths=self.document_lengths,
            key_lengths=seen.lengths,
            window_keys=call.window_keys,
            score_block=call.score_block,
            blocks=call.blocks,
        )
        if result.block_scores_TGC is not None:
            assert call.window_keys is None, "only a layer that sees every key scores blocks"
            self.block_scores[call.layer] = result.block_scores_TGC
        return result

    def _keys_and_values(self, call: AttentionCall) -> SeenKeys:
        """Return the keys and values that the call reads. Stores them if `is_source`."""
        if call.source_layer is not None:
            return self._sources[call.source_layer]
        assert call.k_TGK is not None and call.v_TGV is not None
        # A layer that reads them later may see more of them than this one.
        seen = self._seen(call.k_TGK, call.v_TGV, None if call.is_source else call.window_keys)
        if call.is_source:
            self._sources[call.layer] = seen
        return seen

    def _seen(self, k_TGK: torch.Tensor, v_TGV: torch.Tensor, window_keys: int | None) -> SeenKeys:
        """Return the keys and values of the sequences, at least those within the window (None: no window).

        A subclass adds those of earlier tokens.
        """
        return SeenKeys(k_TGK, v_TGV, self.document_lengths)
