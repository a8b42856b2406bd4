"""Inputs and outputs of a step: tensors and a few integers, which could be broadcast to several workers.

The host plans a step and fills a `StepBuffers`; a `StepInput` is a set of views of its buffers. The buffers have fixed
shapes and addresses, so filling allocates nothing and a captured graph may replay from them.

T packed tokens of the pass, B sequences, R rows to decide, Y rows of a page table, p parts of a group of layers (see
`openmimo.engine.cache`), D model dim, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch

from openmimo.engine.cache import PageArena, PageTables
from openmimo.engine.sampler import SamplingInput

_MAX_VIEWS = 64


class Span(NamedTuple):
    """The new positions `start` to `stop` of one sequence in a pass, and its pages."""

    pages: PageTables
    start: int
    stop: int


class GroupSlots(NamedTuple):
    """The pages that a pass reads and writes in one group of layers.

    Attributes:
        tables_pBY: Page tables, int32. Entries without a page are 0.
        page_pT: The page of each new token, int64.
        offset_T: The offset of each new token in its page, int64.
        kept_rows: The rows of the new tokens that have a page, int64; None if all have one. `page_pT` and `offset_T`
            hold only these. Layers with a window store only the last positions of a long prompt.
    """

    tables_pBY: torch.Tensor
    page_pT: torch.Tensor
    offset_T: torch.Tensor
    kept_rows: torch.Tensor | None


class PassInput(NamedTuple):
    """One forward pass over packed new tokens.

    Attributes:
        token_ids_T: Token ids, int64. For an MTP head, the shifted tokens.
        positions_T: Positions, int64.
        query_lengths_B: New tokens of each sequence, int32.
        key_lengths_B: Positions of each sequence, new ones included, int32.
        starts: The first new position of each sequence.
        stops: The end of the new positions of each sequence.
        groups: Pages per group of layers; None for groups that the pass does not run.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    query_lengths_B: torch.Tensor
    key_lengths_B: torch.Tensor
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    groups: tuple[GroupSlots | None, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """New tokens of each sequence."""
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))


class StepInput(NamedTuple):
    """A pass of the main layers, and the positions to decide after it.

    Attributes:
        main: The pass.
        state_places_T: Rows of the worker's states where main-model states are stored for the MTP heads, int64; None
            without heads.
        state_rows_T: Rows of the pass that these states come from, int64; None: all.
        prompt_heads: Passes of MTP heads over the same prompts.
        decided_rows_R: Rows of the pass after which a token is decided, int64; None: all.
        sampling: Sampling of the decided rows; None if no token is decided.
        draft_rows_BK: For each draft to verify, the row of the token before it, int64; padded with the last row of the
            pass for sequences with fewer than K drafts. None if there are no drafts.
        records_routing: Whether the routed experts are returned.
    """

    main: PassInput
    state_places_T: torch.Tensor | None
    state_rows_T: torch.Tensor | None
    prompt_heads: "tuple[HeadInput, ...]"
    decided_rows_R: torch.Tensor | None
    sampling: SamplingInput | None
    draft_rows_BK: torch.Tensor | None
    records_routing: bool


class StepOutput(NamedTuple):
    """The results of a step, all on the device.

    Attributes:
        tokens_R: Decided tokens, int64; `sampler.NO_TOKEN` where the logits are not finite.
        num_accepted_B: Number of leading drafts of each sequence that equal the decided tokens, int64.
        logprobs_R: Log-probabilities of `tokens_R`, if a request needs any.
        top_ids_RV: The likeliest tokens, if a request needs any.
        top_logprobs_RV: Log-probabilities of `top_ids_RV`.
        routing_TLA: The experts of each token, int64 [T, sparse layers, active experts], if recorded.
        states_TD: Main-model states after the final norm (prompts are scored from them).
    """

    tokens_R: torch.Tensor | None
    num_accepted_B: torch.Tensor | None
    logprobs_R: torch.Tensor | None
    top_ids_RV: torch.Tensor | None
    top_logprobs_RV: torch.Tensor | None
    routing_TLA: torch.Tensor | None
    states_TD: torch.Tensor


class HeadInput(NamedTuple):
    """A pass of one MTP head over several sequences.

    Attributes:
        head: The number of the head.
        forward: The pass, over the shifted tokens.
        state_places_T: The main-model states that it reads, int64: rows of the worker's states, or -1 - r for row r of
            the main pass of the same step.
        draft_rows: Rows of the pass whose token is a draft of an earlier head, int64; None if there are none.
        draft_sources: The index of each of these drafts in the flattened drafts [H, B], int64.
        last_rows_B: The last row of each sequence, int64; None if the pass has one row per sequence.
        sequences_B: The index of each sequence in the drafts, int64; None if the head serves all of them.
    """

    head: int
    forward: PassInput
    state_places_T: torch.Tensor
    draft_rows: torch.Tensor | None
    draft_sources: torch.Tensor | None
    last_rows_B: torch.Tensor | None
    sequences_B: torch.Tensor | None


class _Buffer:
    """A host array and its copy on the device (the same memory on a CPU)."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self._views: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        if device.type == "cpu":  # NumPy's zeros take memory on first use, and tables are mostly empty
            self.array = np.zeros(shape, dtype=np.int64 if dtype == torch.int64 else np.int32)
            self._host = self._device = torch.from_numpy(self.array)
            return
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=True)
        self._device = torch.zeros(shape, dtype=dtype, device=device)
        self.array = self._host.numpy()

    def upload(self, *sizes: int) -> torch.Tensor:
        """The first `sizes` entries of each dimension, on the device."""
        if sizes not in self._views:  # decoding steps repeat their sizes, and making a view costs as much as a kernel
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            part = tuple(slice(size) for size in sizes)
            self._views[sizes] = (self._host[part], self._device[part])
        host, device = self._views[sizes]
        if self._device is not self._host:
            device.copy_(host, non_blocking=True)
        return device


class StepBuffers:
    """Buffers for one pass at a time over `layers`: the next `fill` overwrites the last pass.

    Args:
        arena: The arena whose pages the pass uses.
        device: Of the tensors.
        layers: Layers that the pass runs.
        max_tokens: The most tokens of a pass.
        max_sequences: The most sequences of a pass.
        max_positions: The most positions of a sequence.
    """

    def __init__(
        self,
        arena: PageArena,
        device: torch.device,
        layers: range,
        *,
        max_tokens: int,
        max_sequences: int,
        max_positions: int,
    ):
        self._groups = arena.layout.groups
        self._used_groups = {arena.place_of_layer[layer][0] for layer in layers}
        self._tokens = _Buffer((max_tokens,), torch.int64, device)
        self._positions = _Buffer((max_tokens,), torch.int64, device)
        self._query_lengths = _Buffer((max_sequences,), torch.int32, device)
        self._key_lengths = _Buffer((max_sequences,), torch.int32, device)
        self._tables, self._pages, self._offsets, self._kept = [], [], [], []
        for number, group in enumerate(self._groups):
            num_rows = group.rows_until(max_positions) if number in self._used_groups else 0
            self._tables.append(_Buffer((group.num_parts, max_sequences, num_rows), torch.int32, device))
            self._pages.append(_Buffer((group.num_parts, max_tokens), torch.int64, device))
            self._offsets.append(_Buffer((max_tokens,), torch.int64, device))
            self._kept.append(_Buffer((max_tokens,), torch.int64, device))

    def fill(self, spans: list[Span], tokens: list[int]) -> PassInput:
        """Fills the buffers with a pass over the positions of `spans`, whose tokens are `tokens` in order."""
        num_tokens, num_sequences = len(tokens), len(spans)
        assert num_tokens <= len(self._tokens.array) and num_sequences <= len(self._query_lengths.array)
        starts, stops = tuple(span.start for span in spans), tuple(span.stop for span in spans)
        self._tokens.array[:num_tokens] = tokens
        self._key_lengths.array[:num_sequences] = stops
        end = 0
        for row, span in enumerate(spans):
            count = span.stop - span.start
            self._query_lengths.array[row] = count
            self._positions.array[end : end + count] = range(span.start, span.stop)
            end += count
        assert end == num_tokens, "tokens and spans disagree"
        return PassInput(
            self._tokens.upload(num_tokens),
            self._positions.upload(num_tokens),
            self._query_lengths.upload(num_sequences),
            self._key_lengths.upload(num_sequences),
            starts,
            stops,
            tuple(
                self._slots(number, spans, num_tokens) if number in self._used_groups else None
                for number in range(len(self._groups))
            ),
        )

    def _slots(self, number: int, spans: list[Span], num_tokens: int) -> GroupSlots:
        group = self._groups[number]
        P, parts = group.page_positions, group.num_parts
        tables, pages, offsets = self._tables[number], self._pages[number], self._offsets[number]
        end, num_rows, is_whole = 0, 1, True
        for row, span in enumerate(spans):
            table = span.pages.table(number)
            assert span.stop <= len(table) * P, "a sequence has positions without a row in its page table"
            num_rows = max(num_rows, len(table))
            # MTP heads may have no page for positions still inside the window; those entries point at page 0. Draft
            # quality may suffer. Output does not: drafts are verified.
            first = span.pages.first_row(number)
            np.maximum(table[first:].T, 0, out=tables.array[:, row, first : len(table)])
            count = span.stop - span.start
            if count == 1:
                pages.array[:, end] = table[span.start // P]
                is_whole = is_whole and table[span.start // P, 0] >= 0
            else:
                found = table[np.arange(span.start, span.stop) // P]
                pages.array[:, end : end + count] = found.T
                is_whole = is_whole and bool(found[:, 0].min() >= 0)
            end += count
        np.bitwise_and(self._positions.array[:num_tokens], P - 1, out=offsets.array[:num_tokens])
        kept_rows, num_kept = None, num_tokens
        if not is_whole:
            kept = np.flatnonzero(pages.array[0, :num_tokens] >= 0)
            num_kept = len(kept)
            self._kept[number].array[:num_kept] = kept
            pages.array[:, :num_kept] = pages.array[:, kept]
            offsets.array[:num_kept] = offsets.array[kept]
            kept_rows = self._kept[number].upload(num_kept)
        return GroupSlots(
            tables.upload(parts, len(spans), num_rows),
            pages.upload(parts, num_kept),
            offsets.upload(num_kept),
            kept_rows,
        )
