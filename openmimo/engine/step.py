"""Inputs and outputs of a step: tensors and a few integers, which could be broadcast to several workers.

The host plans a step and fills a `StepBuffers`; a `StepInput` is a set of views of its buffers. The buffers have fixed
shapes and addresses, so filling allocates nothing and a captured graph may replay from them.

T packed tokens of the pass, B sequences, R rows to decide, Y rows of a page table, p parts of a group of layers (see
`openmimo.engine.cache`), D model dim, V vocabulary.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from openmimo.engine.cache import PageArena, PageTables
from openmimo.engine.sampler import SamplingInput
from openmimo.runtime.device import HostBlock

MAX_SHORT_TOKENS = 16  # new tokens per sequence up to which a pass decodes or verifies drafts
_MAX_VIEWS = 256
_ALIGNMENT_BYTES = 16
_STAGING_MARGIN = 1 << 12  # bytes, for alignment
_MAX_VALUES = 16  # names of `StepBuffers.values` in one step
_MAX_PADDED_TOKENS = 512  # larger passes keep the device busy for longer than their launches take
_FIRST_POSITIONS, _NEXT_POSITIONS = 512, 4
PROMPTS = 16  # sequences of a captured pass over prompts
_PROMPT_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_CHEAP_TOKENS = 2048  # padding to this many costs less than the launches that a graph saves
_FULL_SHARE = 0.85
_MAX_DRAFTING_TOKENS = 512
_NUMPY_DTYPES = {torch.int32: np.int32, torch.int64: np.int64, torch.float64: np.float64}


class Span(NamedTuple):
    """The new positions `start` to `stop` of one sequence in a pass, and its pages."""

    pages: PageTables
    start: int
    stop: int


class GroupSlots(NamedTuple):
    """The pages that a pass reads and writes in one group of layers.

    Attributes:
        tables_BY: For each part, the page tables, int32. Entries without a page are 0.
        page_T: For each part, the page of each new token, int64.
        offset_T: The offset of each new token in its page, int64.
        kept_rows: The rows of the new tokens that have a page, int64; None if all have one. `page_T` and `offset_T`
            hold only these. Layers with a window store only the last positions of a long prompt.
    """

    tables_BY: tuple[torch.Tensor, ...]
    page_T: tuple[torch.Tensor, ...]
    offset_T: torch.Tensor
    kept_rows: torch.Tensor | None


class PassShape(NamedTuple):
    """The padded sizes of a pass that a captured graph replays.

    Attributes:
        num_sequences: Sequences. The last ones may have no tokens.
        num_tokens: Tokens. The last ones belong to no sequence and have no page.
        longest_query: The most new tokens of a sequence.
        longest_key: The most positions of a sequence.
    """

    num_sequences: int
    num_tokens: int
    longest_query: int
    longest_key: int

    @property
    def is_prompt(self) -> bool:
        """Whether the pass reads prompts: its sequences may have any number of new tokens."""
        return self.longest_query > MAX_SHORT_TOKENS


class PassInput(NamedTuple):
    """One forward pass over packed new tokens.

    Attributes:
        token_ids_T: Token ids, int64. For an MTP head, the shifted tokens. In a step with `StepInput.reads_decided`,
            -1 - d stands for entry d of the worker's decided tokens, which the host has not read yet.
        positions_T: Positions, int64.
        query_lengths_B: New tokens of each sequence, int32.
        key_lengths_B: Positions of each sequence, new ones included, int32.
        starts: The first new position of each sequence.
        stops: The end of the new positions of each sequence.
        groups: Pages per group of layers; None for groups that the pass does not run.
        num_tokens: Tokens of the sequences, without padding.
        shape: The padded sizes of the tensors; None if they are exact. If padded, `starts` and `stops` are bounds.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    query_lengths_B: torch.Tensor
    key_lengths_B: torch.Tensor
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    groups: tuple[GroupSlots | None, ...]
    num_tokens: int
    shape: PassShape | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """New tokens of each sequence."""
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))


class DraftInput(NamedTuple):
    """Drafts that a step makes before its pass, which then verifies them.

    Attributes:
        heads: The passes of the drafting heads, in order.
        width: Columns of the drafts [H, W]: one for each sequence, and more if the passes are padded.
        rows_N: The rows of the main pass whose tokens are drafts, int64.
        sources_N: The index of each of these drafts in the flattened drafts [H, W], int64.
    """

    heads: "tuple[HeadInput, ...]"
    width: int
    rows_N: torch.Tensor
    sources_N: torch.Tensor


class ScoredRows(NamedTuple):
    """Rows of a pass after which the next tokens of a prompt are scored.

    Attributes:
        first: The first row.
        stop: The end of the rows.
        targets_N: The token after each, int64.
        temperature: Divides the logits.
        num_top_logprobs: How many of the likeliest tokens are returned.
    """

    first: int
    stop: int
    targets_N: torch.Tensor
    temperature: float
    num_top_logprobs: int = 0


class PromptScores(NamedTuple):
    """The log-probabilities after the rows of a `ScoredRows`. Those of a row come from one tensor.

    Attributes:
        logprobs_N: Of the targets.
        top_ids_NV: The likeliest tokens, if requested.
        top_logprobs_NV: Their log-probabilities.
    """

    logprobs_N: torch.Tensor
    top_ids_NV: torch.Tensor | None = None
    top_logprobs_NV: torch.Tensor | None = None


class StepInput(NamedTuple):
    """A pass of the main layers, and the positions to decide after it.

    Attributes:
        main: The pass.
        drafting: Drafts that are made first; None if there are none, or if the host knows them.
        state_places_T: Rows of the worker's states where main-model states are stored for the MTP heads, int64; None
            without heads.
        state_rows_T: Rows of the pass that these states come from, int64; None: all.
        prompt_heads: Passes of MTP heads over the same prompts.
        decided_rows_R: Rows of the pass after which a token is decided, int64; None: all.
        sampling: Sampling of the decided rows; None if no token is decided.
        draft_rows_BK: For each draft to verify, the row of the token before it, int64; padded with the last row of the
            pass for sequences with fewer than K drafts. None if there are no drafts.
        scored: Rows of prompts whose log-probabilities are computed.
        records_routing: Whether the routed experts are returned.
        returns_states: Whether the states are returned.
        reads_decided: Whether a token of the pass is one that an earlier step decided.
        decided_place: The first entry of the worker's decided tokens that keep those of this step; None: not kept.
    """

    main: PassInput
    drafting: DraftInput | None
    state_places_T: torch.Tensor | None
    state_rows_T: torch.Tensor | None
    prompt_heads: "tuple[HeadInput, ...]"
    decided_rows_R: torch.Tensor | None
    sampling: SamplingInput | None
    draft_rows_BK: torch.Tensor | None
    scored: tuple[ScoredRows, ...]
    records_routing: bool
    returns_states: bool = False
    reads_decided: bool = False
    decided_place: int | None = None


class StepOutput(NamedTuple):
    """The results of a step, all on the device.

    Attributes:
        tokens_R: Decided tokens, int64; `sampler.NO_TOKEN` where the logits are not finite.
        num_accepted_B: Number of leading drafts of each sequence that equal the decided tokens, int64.
        logprobs_R: Log-probabilities of `tokens_R`, if a request needs any.
        top_ids_RV: The likeliest tokens, if a request needs any.
        top_logprobs_RV: Log-probabilities of `top_ids_RV`.
        routing_TLA: The experts of each token, int64 [T, sparse layers, active experts], if recorded.
        prompt_scores: The log-probabilities after the rows of each of `StepInput.scored`.
        states_TD: Main-model states after the final norm, if requested.
    """

    tokens_R: torch.Tensor | None
    num_accepted_B: torch.Tensor | None
    logprobs_R: torch.Tensor | None
    top_ids_RV: torch.Tensor | None
    top_logprobs_RV: torch.Tensor | None
    routing_TLA: torch.Tensor | None
    prompt_scores: tuple[PromptScores, ...]
    states_TD: torch.Tensor | None = None


class AdmittedRows(NamedTuple):
    """What the host knows of sequences whose lengths a worker counts from this step on. A sequences.

    Attributes:
        seats_A: Their seats, int64.
        rows_AM: The rows of the worker's memory of sequences (see `openmimo.engine.ahead`), int64. A negative token is
            as in `PassInput.token_ids_T`.
    """

    seats_A: torch.Tensor
    rows_AM: torch.Tensor


class AheadInput(NamedTuple):
    """A decoding step that is planned before the host knows how many drafts the steps before it accepted.

    The worker knows the length of each sequence and derives tokens, positions, lengths and slots. All tensors are int64
    unless stated, and padded to `main_shape.num_sequences`.

    Attributes:
        seats_B: The seat of each sequence; for padding the worker's last one.
        limits_B: The most drafts of each sequence in this step: 0 to `num_heads`, -1 for padding. Surplus rows of the
            passes are masked.
        max_lengths_B: The most tokens of each sequence. A sequence that has as many computes its last position again.
        whole_from_B: The first position of each sequence from which on it surely has pages.
        tables: For each group of layers, the page tables of its parts, int32 [p, B, Y], as in `GroupSlots.tables_BY`.
        main_shape: Sizes of the pass of the main layers.
        head_shape: Sizes of the passes of the drafting heads.
        num_heads: Heads that draft: the largest limit.
        is_captured: Whether the step is a captured graph.
        draws: Whether a sequence is sampled.
        has_filters: Whether a sampled sequence has top-p, top-k or min-p.
        returns_logprobs: Whether a request needs log-probabilities.
        num_top_logprobs: The largest `top_logprobs` of a request.
        admitted: Sequences that the worker does not know yet; None if there are none.
        sampling: Sampling parameters of requests that the worker does not know yet.
    """

    seats_B: torch.Tensor
    limits_B: torch.Tensor
    max_lengths_B: torch.Tensor
    whole_from_B: torch.Tensor
    tables: tuple[torch.Tensor, ...]
    main_shape: PassShape
    head_shape: PassShape
    num_heads: int
    is_captured: bool
    draws: bool
    has_filters: bool
    returns_logprobs: bool
    num_top_logprobs: int
    admitted: AdmittedRows | None
    sampling: SamplingInput


class AheadOutput(NamedTuple):
    """The results of an `AheadInput`, all on the device. L is one more than its heads.

    Attributes:
        results_BX: For each sequence, int64: how many drafts were verified and how many of them were accepted, and L
            decided tokens as in `StepOutput`, of which those after the verified drafts have no meaning.
        logprobs_BL: Log-probabilities of the decided tokens, if a request needs any.
        top_ids_BLV: The likeliest tokens, if a request needs any.
        top_logprobs_BLV: Their log-probabilities.
    """

    results_BX: torch.Tensor
    logprobs_BL: torch.Tensor | None = None
    top_ids_BLV: torch.Tensor | None = None
    top_logprobs_BLV: torch.Tensor | None = None


class HeadInput(NamedTuple):
    """A pass of one MTP head over several sequences.

    Attributes:
        head: The number of the head.
        forward: The pass, over the shifted tokens.
        state_places_T: The main-model states that it reads, int64: rows of the worker's states, or -1 - r for row r of
            the main pass of the same step.
        draft_rows: Rows of the pass whose token is a draft of an earlier head, int64; None if there are none.
        draft_sources: The index of each of these drafts in the flattened drafts [H, W], int64.
        last_rows_B: The last row of each sequence, int64; None if the pass has one row per sequence.
        sequences_B: The column of each sequence in the drafts, int64; None if the head serves all of them.

    In a padded pass the last row belongs to no sequence, and neither does the last column of the drafts. Surplus
    entries of the lists name these.
    """

    head: int
    forward: PassInput
    state_places_T: torch.Tensor
    draft_rows: torch.Tensor | None
    draft_sources: torch.Tensor | None
    last_rows_B: torch.Tensor | None
    sequences_B: torch.Tensor | None


def prompt_shape(num_sequences: int, num_tokens: int, longest_key: int, *, max_positions: int) -> PassShape | None:
    """The smallest shape of a graph that holds a pass over prompts; None if it is too large, or half empty.

    Args:
        num_sequences: Sequences of the pass.
        num_tokens: Tokens of the pass.
        longest_key: The most positions of a sequence.
        max_positions: Limit of the model.
    """
    tokens = padded_prompt_tokens(num_tokens)
    is_too_empty = tokens > _CHEAP_TOKENS and num_tokens < _FULL_SHARE * tokens
    if num_tokens > _PROMPT_TOKENS[-1] or num_sequences > PROMPTS or is_too_empty:
        return None
    return PassShape(PROMPTS, tokens, tokens, _padded_positions(longest_key, max_positions))


def captured_prompt_tokens(most: int) -> tuple[int, ...]:
    """The tokens of captured passes over prompts, up to `most`."""
    return tuple(size for size in _PROMPT_TOKENS if size <= most)


def captured_batches(max_sequences: int) -> list[int]:
    """The sequences of captured decoding passes of an engine with this limit."""
    return sorted({min(padded_batch(count), max_sequences) for count in range(1, max_sequences + 1)})


def padded_prompt_tokens(num_tokens: int) -> int:
    """The tokens of the smallest captured pass over prompts that holds `num_tokens`, or `num_tokens` if none does."""
    return next((size for size in _PROMPT_TOKENS if size >= num_tokens), num_tokens)


def draft_shape(
    num_sequences: int, num_drafts: int, longest_key: int, *, max_sequences: int, max_positions: int
) -> PassShape | None:
    """The shape of the passes of drafting heads in a graph; None if they are too large for one.

    A head computes the positions of the last step, and those of earlier drafts: fewer than twice the drafts and one.

    Args:
        num_sequences: Sequences of the step.
        num_drafts: Heads that may draft.
        longest_key: The most positions of a sequence.
        max_sequences: Limit of the engine.
        max_positions: Limit of the model.
    """
    sequences, rows = min(padded_batch(num_sequences), max_sequences), draft_rows_of(num_drafts)
    if sequences * rows > _MAX_DRAFTING_TOKENS or rows > MAX_SHORT_TOKENS:
        return None
    return PassShape(sequences, sequences * rows, rows, _padded_positions(longest_key, max_positions))


def draft_rows_of(num_drafts: int) -> int:
    """Rows of a sequence in a padded pass of a drafting head."""
    return 1 << (2 * num_drafts).bit_length()


def padded_shape(
    num_sequences: int, longest_query: int, longest_key: int, *, max_sequences: int, max_positions: int
) -> PassShape | None:
    """The smallest shape of a graph that holds a pass; None if it is too large for a graph.

    There are few shapes: 1, 2, 4, 8, 12, 16, 24, 32, ... sequences with equally many tokens, and up to 512, 2,048,
    8,192, ... positions.

    Args:
        num_sequences: Sequences of the pass.
        longest_query: The most new tokens of a sequence.
        longest_key: The most positions of a sequence.
        max_sequences: Limit of the engine.
        max_positions: Limit of the model.
    """
    sequences = min(padded_batch(num_sequences), max_sequences)
    if sequences * longest_query > _MAX_PADDED_TOKENS:
        return None
    return PassShape(sequences, sequences * longest_query, longest_query, _padded_positions(longest_key, max_positions))


class AheadShapes(NamedTuple):
    """The sizes of a step that is planned ahead.

    Attributes:
        main: Of the pass of the main layers.
        heads: Of the passes of the drafting heads.
        is_captured: Whether a graph is worth its memory.
    """

    main: PassShape
    heads: PassShape
    is_captured: bool


def ahead_shapes(
    limits: list[int], num_heads: int, longest_key: int, *, num_drafts: int, max_sequences: int, max_positions: int
) -> AheadShapes:
    """The smallest sizes that hold a step planned ahead. The main pass has a multiple of its sequences of rows.

    So rows that drafts of other sequences leave over are few, and so are the sizes.

    Args:
        limits: The most drafts of each sequence.
        num_heads: Heads that draft.
        longest_key: The most positions of a sequence.
        num_drafts: Heads that may draft.
        max_sequences: Limit of the engine.
        max_positions: Limit of the model.
    """
    sequences, rows = min(padded_batch(len(limits)), max_sequences), draft_rows_of(num_drafts)
    positions = _padded_positions(longest_key, max_positions)
    num_tokens = -(-(len(limits) + sum(limits)) // sequences) * sequences
    main = PassShape(sequences, num_tokens, 1 + num_heads, positions)
    heads = PassShape(sequences, sequences * rows, rows, positions)
    fits = main.num_tokens <= _MAX_PADDED_TOKENS and (num_heads == 0 or heads.num_tokens <= _MAX_DRAFTING_TOKENS)
    return AheadShapes(main, heads, fits)


def _padded_positions(longest_key: int, max_positions: int) -> int:
    """The next of 512, 2,048, 8,192, ..."""
    positions = _FIRST_POSITIONS
    while positions < longest_key:
        positions *= _NEXT_POSITIONS
    return min(positions, max_positions)


def padded_batch(count: int) -> int:
    """The sequences of the captured pass that holds `count`: the next of 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, ..."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if count <= 3 * power // 4 and power >= 16 else power


class _StagedViews(NamedTuple):
    """The place of one array of a step in both blocks of the host and on the device, and where the next one begins."""

    hosts: tuple[np.ndarray, ...]
    device: torch.Tensor
    stop: int


class _Staging:
    """Memory on an accelerator that a step's arrays fill by one copy, from pinned memory.

    A view of the device has the same address whenever the same sizes were added before it, as a captured graph needs.
    There are two blocks of pinned memory, used in turn: the host fills one while the device may still read the other.
    """

    def __init__(self, num_bytes: int, device: torch.device):
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._blocks = tuple(HostBlock(num_bytes) for _ in range(2))
        self._turn = self._num_used = 0
        self._views: dict[tuple[int, torch.dtype, tuple[int, ...]], _StagedViews] = {}

    def add(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """Copies an array to pinned memory; returns its place on the device, which `send` fills."""
        key = (self._num_used, dtype, array.shape)
        views = self._views.get(key)
        if views is None:
            views = self._new_views(*key, array)
        views.hosts[self._turn][...] = array
        self._num_used = views.stop
        return views.device

    def _new_views(self, first: int, dtype: torch.dtype, shape: tuple[int, ...], array: np.ndarray) -> _StagedViews:
        stop = first + array.nbytes
        assert stop <= self._device.numel(), "the arrays of a step exceed its memory"
        hosts = tuple(block.array[first:stop].view(array.dtype).reshape(shape) for block in self._blocks)
        device = self._device[first:stop].view(dtype).view(shape)
        if len(self._views) == _MAX_VIEWS:
            self._views.clear()
        views = _StagedViews(hosts, device, -(-stop // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        self._views[first, dtype, shape] = views
        return views

    def send(self) -> None:
        """Queues the copy of everything added, and begins with the other block."""
        if self._num_used:
            self._blocks[self._turn].send(self._device, self._num_used)
            self._turn, self._num_used = 1 - self._turn, 0
            self._blocks[self._turn].wait()


class _Buffer:
    """A host array, and the tensor of a part of it: the same memory on a CPU, else a part of `staging`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, staging: _Staging | None):
        self.array = np.zeros(shape, dtype=_NUMPY_DTYPES[dtype])  # takes memory on first use; tables are mostly empty
        self._tensor = torch.from_numpy(self.array)
        self._staging = staging
        self._views: dict[tuple[int, ...], torch.Tensor] = {}
        self._parts: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}

    def upload(self, *sizes: int) -> torch.Tensor:
        """The first `sizes` entries of each dimension, on the device."""
        if self._staging is not None:
            return self._staging.add(self.array[tuple(slice(size) for size in sizes)], self._tensor.dtype)
        if sizes not in self._views:  # decoding steps repeat their sizes, and making a view costs as much as a kernel
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            self._views[sizes] = self._tensor[tuple(slice(size) for size in sizes)]
        return self._views[sizes]

    def upload_parts(self, *sizes: int) -> tuple[torch.Tensor, ...]:
        """As `upload`, but a view for each index of the first dimension."""
        if self._staging is not None:
            return self.upload(*sizes).unbind(0)
        if sizes not in self._parts:
            if len(self._parts) == _MAX_VIEWS:
                self._parts.clear()
            self._parts[sizes] = self.upload(*sizes).unbind(0)
        return self._parts[sizes]


class StepBuffers:
    """Buffers for one pass at a time over `layers`: the next `fill` overwrites the last pass.

    A step fills and then calls `send`. On an accelerator the host may fill for the next step at once: the device works
    on its own copy, which the next `send` overwrites in the order of the queue.

    Args:
        arena: The arena whose pages the pass uses.
        device: Of the tensors.
        layers: Layers that the pass runs.
        max_tokens: The most tokens of a pass.
        max_sequences: The most sequences of a pass.
        max_positions: The most positions of a sequence.

    Attributes:
        device: Of the tensors.
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
        self.device = device
        self._groups = arena.layout.groups
        self._used_groups = {arena.place_of_layer[layer][0] for layer in layers}
        table_shapes = [
            (group.num_parts, max_sequences, group.rows_until(max_positions) if number in self._used_groups else 0)
            for number, group in enumerate(self._groups)
        ]
        self._staging = self._value_staging = None
        if device.type != "cpu":
            pass_bytes = 4 * sum(map(math.prod, table_shapes)) + 8 * (max_tokens + 8) * sum(
                4 + group.num_parts for group in self._groups
            )
            self._staging = _Staging(pass_bytes + 8 * max_sequences + _STAGING_MARGIN, device)
            self._value_staging = _Staging(_MAX_VALUES * (8 * max_tokens + _ALIGNMENT_BYTES), device)
        staging = self._staging
        self._tokens = _Buffer((max_tokens,), torch.int64, staging)
        self._positions = _Buffer((max_tokens,), torch.int64, staging)
        self._query_lengths = _Buffer((max_sequences,), torch.int32, staging)
        self._key_lengths = _Buffer((max_sequences,), torch.int32, staging)
        self._tables, self._pages, self._offsets, self._kept = [], [], [], []
        for group, table_shape in zip(self._groups, table_shapes, strict=True):
            self._tables.append(_Buffer(table_shape, torch.int32, staging))
            self._pages.append(_Buffer((group.num_parts, max_tokens), torch.int64, staging))
            self._offsets.append(_Buffer((max_tokens,), torch.int64, staging))
            self._kept.append(_Buffer((max_tokens,), torch.int64, staging))
        self._max_tokens = max_tokens
        self._values: dict[str, _Buffer] = {}
        self._counting = np.arange(max_sequences)
        # The sequence whose table each row of `_tables` holds, and how many of its rows were copied, by group.
        self._owners: list[PageTables | None] = [None] * max_sequences
        self._num_copied = [[0] * max_sequences for _ in self._groups]

    def send(self) -> None:
        """Queues the copy of what was filled to an accelerator. Every step calls it before its passes run."""
        if self._staging is not None and self._value_staging is not None:
            self._staging.send()
            self._value_staging.send()

    def values(
        self, name: str, values: "list[int] | list[float] | range", dtype: torch.dtype = torch.int64
    ) -> torch.Tensor:
        """Puts `values` into the buffer of this name, which is made at its first use; returns the filled part."""
        buffer = self._values.get(name)
        if buffer is None:
            buffer = self._values[name] = _Buffer((self._max_tokens,), dtype, self._value_staging)
        buffer.array[: len(values)] = values
        return buffer.upload(len(values))

    def fill(self, spans: list[Span], tokens: list[int], shape: PassShape | None = None) -> PassInput:
        """Fills the buffers with a pass over the positions of `spans`, whose tokens are `tokens` in order.

        Args:
            shape: Sizes to which the tensors are padded, if every new token surely has a page.
        """
        num_tokens, num_sequences = len(tokens), len(spans)
        assert num_tokens <= len(self._tokens.array) and num_sequences <= len(self._query_lengths.array)
        starts, stops = tuple(span.start for span in spans), tuple(span.stop for span in spans)
        self._tokens.array[:num_tokens] = tokens
        self._key_lengths.array[:num_sequences] = stops
        counts: list[int] = []
        positions: list[int] = []
        is_whole = True
        for row, span in enumerate(spans):
            counts.append(span.stop - span.start)
            positions += range(span.start, span.stop)
            is_whole = is_whole and span.start >= span.pages.whole_from
            assert span.stop <= span.pages.num_positions, "a sequence has positions without a row in its page table"
            self._own(row, span.pages)
        self._query_lengths.array[:num_sequences] = counts
        self._positions.array[:num_tokens] = positions  # raises if tokens and spans disagree
        sequence_T = self._counting[:num_sequences]
        if num_tokens > num_sequences:
            sequence_T = sequence_T.repeat(counts)
        if not is_whole:
            shape = None
        padded_tokens, padded_sequences = num_tokens, num_sequences
        if shape is not None:
            padded_tokens, padded_sequences = shape.num_tokens, shape.num_sequences
            stops = (shape.longest_key,) * padded_sequences
            starts = (shape.longest_key - shape.longest_query,) * padded_sequences
            for buffer in (self._tokens, self._positions):
                buffer.array[num_tokens:padded_tokens] = 0
            for buffer in (self._query_lengths, self._key_lengths):
                buffer.array[num_sequences:padded_sequences] = 0
        return PassInput(
            self._tokens.upload(padded_tokens),
            self._positions.upload(padded_tokens),
            self._query_lengths.upload(padded_sequences),
            self._key_lengths.upload(padded_sequences),
            starts,
            stops,
            tuple(
                self._slots(number, spans, sequence_T, is_whole=is_whole, shape=shape)
                if number in self._used_groups
                else None
                for number in range(len(self._groups))
            ),
            num_tokens,
            shape,
        )

    def fill_tables(self, sequences: list[PageTables], shape: PassShape) -> tuple[torch.Tensor, ...]:
        """Fills the page tables of all groups only: int32 [p, B, Y] each, padded to `shape`."""
        for row, pages in enumerate(sequences):
            self._own(row, pages)
        filled = []
        for number, group in enumerate(self._groups):
            for row, pages in enumerate(sequences):
                self._copy_table(number, row, pages)
            num_rows = group.rows_until(shape.longest_key)
            filled.append(self._tables[number].upload(group.num_parts, shape.num_sequences, num_rows))
        return tuple(filled)

    def _own(self, row: int, pages: PageTables) -> None:
        """Gives a row of the tables to a sequence."""
        if self._owners[row] is not pages:
            self._owners[row] = pages
            for num_copied in self._num_copied:
                num_copied[row] = 0

    def _slots(
        self, number: int, spans: list[Span], sequence_T: np.ndarray, *, is_whole: bool, shape: PassShape | None
    ) -> GroupSlots:
        """Fills the pages of a group of layers.

        Args:
            sequence_T: The index of the sequence of each new token.
            is_whole: Whether every new token surely has a page.
            shape: Sizes to which the tensors are padded.
        """
        P, parts, num_tokens = self._groups[number].page_positions, self._groups[number].num_parts, len(sequence_T)
        tables, pages, offsets = self._tables[number], self._pages[number], self._offsets[number]
        num_rows = max(self._copy_table(number, row, span.pages) for row, span in enumerate(spans))
        positions = self._positions.array[:num_tokens]
        np.bitwise_and(positions, P - 1, out=offsets.array[:num_tokens])
        kept_rows, num_kept = None, num_tokens
        if is_whole:
            pages.array[:, :num_tokens] = tables.array[:, sequence_T, positions // P]
        else:
            for span, end in zip(spans, itertools.accumulate(span.stop - span.start for span in spans), strict=True):
                found = span.pages.table(number)[np.arange(span.start, span.stop) // P]
                pages.array[:, end - len(found) : end] = found.T
            kept = np.flatnonzero(pages.array[0, :num_tokens] >= 0)
            if len(kept) < num_tokens:
                num_kept = len(kept)
                self._kept[number].array[:num_kept] = kept
                pages.array[:, :num_kept] = pages.array[:, kept]
                offsets.array[:num_kept] = offsets.array[kept]
                kept_rows = self._kept[number].upload(num_kept)
        num_sequences = len(spans)
        if shape is not None:
            pages.array[:, num_tokens : shape.num_tokens] = -1
            num_kept, num_sequences = shape.num_tokens, shape.num_sequences
            num_rows = self._groups[number].rows_until(shape.longest_key)
        return GroupSlots(
            tables.upload_parts(parts, num_sequences, num_rows),
            pages.upload_parts(parts, num_kept),
            offsets.upload(num_kept),
            kept_rows,
        )

    def _copy_table(self, number: int, row: int, pages: PageTables) -> int:
        """Copies the rows that a sequence's table has gained since the last pass; returns its number of rows."""
        num_rows, num_copied = pages.num_rows(number), self._num_copied[number]
        if num_copied[row] < num_rows:
            # MTP heads may have no page for positions still inside the window; those entries point at page 0. Draft
            # quality may suffer. Output does not: drafts are verified.
            first = max(num_copied[row], pages.first_row(number))
            np.maximum(
                pages.table(number)[first:].T, 0, out=self._tables[number].array[:, row, first:num_rows]
            )  # fmt: skip
            num_copied[row] = num_rows
        return num_rows
