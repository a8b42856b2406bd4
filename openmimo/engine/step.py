"""What one step sends to the workers and gets from them: tensors and a few integers, so that it can be broadcast.

The host plans a step and fills the buffers of a `StepBuffers`; a `StepInput` is a set of views of them. The buffers
have fixed shapes and addresses, so filling allocates nothing and a captured graph may replay from them.

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
    """Positions `start` to `stop` of one sequence, new in a pass, and its pages."""

    pages: PageTables
    start: int
    stop: int


class GroupSlots(NamedTuple):
    """Where a pass reads and writes in one group of layers.

    Attributes:
        tables_pBY: Page tables, int32. Entries without a page are 0.
        page_pT: The page of each new token, int64.
        offset_T: The place of each new token in its page, int64.
        kept_rows: The new tokens that have a page, int64, where not all of them do; `page_pT` and `offset_T` then name
            only these. Layers with a window store only the last positions of a long prompt.
    """

    tables_pBY: torch.Tensor
    page_pT: torch.Tensor
    offset_T: torch.Tensor
    kept_rows: torch.Tensor | None


class PassInput(NamedTuple):
    """One forward pass over packed new tokens.

    Attributes:
        token_ids_T: int64. For an MTP head, the shifted tokens.
        positions_T: int64.
        query_lengths_B: New tokens of each sequence, int32.
        key_lengths_B: Positions of each sequence, new ones included, int32.
        starts: The first new position of each sequence.
        stops: The end of the new positions of each sequence.
        groups: One per group of layers; None for those that the pass does not run.
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
    """A pass of the main layers, and what to decide after it.

    Attributes:
        main: The pass.
        state_places_T: Where main-model states are kept for the MTP heads, int64: rows of the worker's states.
        state_rows_T: Which rows of the pass these are, int64; None: all.
        prompt_heads: MTP heads that read the same prompts.
        decided_rows_R: The rows of the pass after which a token is decided, int64; None: all.
        sampling: How each of them is decided; None: nothing is.
        draft_rows_BK: For each draft that is verified, the row of the token before it, int64; the last row of the pass
            where a sequence has fewer than K drafts. None in a pass that verifies nothing.
        records_routing: Whether the chosen experts are returned.
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
        num_accepted_B: How many drafts of each sequence, from the first on, equal the decided tokens; int64.
        logprobs_R: Their log-probabilities, if a request needs any.
        top_ids_RV: The likeliest tokens, if a request needs any, and `top_logprobs_RV`, theirs.
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
    """One MTP head over several sequences.

    Attributes:
        head: Its number.
        forward: The pass; its tokens are the shifted ones.
        state_places_T: Which main-model states it reads, int64: rows of the worker's states, or -1 - r for row r of the
            pass that comes before it in the same step.
        draft_rows: Rows of the pass whose token is a draft of an earlier head, int64; `draft_heads` and
            `draft_sequences` name which. None where there are none.
        last_rows_B: The last row of each sequence, int64.
        sequences_B: The place of each sequence in the result of the drafting, int64.
    """

    head: int
    forward: PassInput
    state_places_T: torch.Tensor
    draft_rows: torch.Tensor | None
    draft_heads: torch.Tensor | None
    draft_sequences: torch.Tensor | None
    last_rows_B: torch.Tensor
    sequences_B: torch.Tensor


class _Buffer:
    """A host array and its copy on the device (the same memory on a CPU)."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self._views: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        if device.type == "cpu":  # memory from the system, which gives it on first use: tables are mostly empty
            self.array = np.zeros(shape, dtype=np.int64 if dtype == torch.int64 else np.int32)
            self._host = self._device = torch.from_numpy(self.array)
            return
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=True)
        self._device = torch.zeros(shape, dtype=dtype, device=device)
        self.array = self._host.numpy()

    def upload(self, *sizes: int) -> torch.Tensor:
        """The first `sizes` entries of each dimension, on the device."""
        if sizes not in self._views:  # steps of decoding repeat their sizes; a view costs as much as a small kernel
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            part = tuple(slice(size) for size in sizes)
            self._views[sizes] = (self._host[part], self._device[part])
        host, device = self._views[sizes]
        if self._device is not self._host:
            device.copy_(host, non_blocking=True)
        return device


class StepBuffers:
    """Memory of one pass over `layers`: fixed addresses, for `max_tokens` tokens of `max_sequences` sequences.

    A pass is valid until the next one is filled.
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
        """The pass over `tokens`, which are those of the positions of `spans`, packed in order."""
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
            # A head may have skipped positions that a window still covers, and that have no page. It reads page 0
            # there: its draft may be worse for it, and the text is the same.
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
