"""Executes steps on one device: the forward pass over a paged cache, sampling, verification of drafts, drafting heads.

`PagedContext` is the engine's attention context: packed new tokens of several sequences, whose keys it writes to the
pages. A worker knows no requests: it takes the tensors of a step and returns tensors. Two workers with equal weights,
page contents and states return equal results for equal steps. Several ranks of one engine would rely on this.

On an accelerator, decoding passes are captured graphs, so that the host launches a pass at once. A graph has fixed
shapes. The host therefore pads a pass (`step.padded_shape`) by sequences without tokens and tokens without a page. The
kernels of such a pass skip the padding, and none makes the host wait.

T packed new tokens, S keys, N query heads, G key/value heads, K key dim, V value dim, R rotated dims in the context and
decided rows in the worker, B sequences, Y rows of a table, H drafting heads, D model dim.
"""

import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch

from openmimo.engine.cache import PageArena
from openmimo.engine.sampler import SamplingTable, decide, decided_logprobs, likeliest
from openmimo.engine.step import (
    MAX_SHORT_TOKENS,
    GroupSlots,
    HeadInput,
    PassInput,
    PassShape,
    PromptScores,
    ScoredRows,
    StepInput,
    StepOutput,
)
from openmimo.kernels.attention import (
    PAGED_ATTENTION,
    AttentionOut,
    ChosenBlocks,
    Integers,
    PagedNeed,
    Pages,
    attend,
    paged_attend,
    read_rows,
    store,
    update_and_attend,
)
from openmimo.kernels.dispatch import triton_unavailable
from openmimo.kernels.operations import EXPERTS, MIXED, ExpertsNeed, rotary_table
from openmimo.kernels.weights import FP8, INT8, PLAIN, format_of
from openmimo.model.attention import AttentionConfig, Rotation
from openmimo.model.backbone import Hidden
from openmimo.model.context import AttentionCall, RouterLoss, RoutingTape
from openmimo.model.layers import Linear
from openmimo.model.mimo import MiMo
from openmimo.model.moe import Experts
from openmimo.model.weight_formats import QuantizableModule
from openmimo.runtime.device import CapturedGraphs

_FIRST_POSITIONS = 512
_ROTARY_PIECE = 1 << 16
_MAX_SCORED_NUMBERS = 1 << 22  # logits of a prompt that are held at once; 16 MiB in float32
_MOST_PROMPT_TOKENS, _FEW_TOKENS = 8192, 256
Result = TypeVar("Result")
_Geometry = tuple[Rotation, torch.dtype]


class RotaryRows:
    """Rotary tables of all positions seen so far. A pass only selects its rows.

    Args:
        device: Of the tables.
        max_positions: Rows that are allocated at once; only the filled part grows. So the addresses are constant, as a
            captured graph needs. (On a CPU, rows take physical memory on first use.)
    """

    def __init__(self, device: torch.device | str, max_positions: int):
        self.device = device
        self._max_positions = max_positions
        self._tables: dict[_Geometry, tuple[torch.Tensor, torch.Tensor]] = {}
        self._num_known: dict[_Geometry, int] = {}

    def tables(self, spec: AttentionConfig, dtype: torch.dtype, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [max_positions, R], filled for at least the positions below `length`."""
        geometry = (spec.rotation, dtype)
        if geometry not in self._tables:
            shape = (self._max_positions, spec.rotary_dim)
            cos, sin = (torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2))
            self._tables[geometry], self._num_known[geometry] = (cos, sin), 0
        if self._num_known[geometry] < length:
            self._grow(geometry, length)
        return self._tables[geometry]

    def _grow(self, geometry: _Geometry, length: int) -> None:
        """Fills rows up to `length`, and at least doubles the filled part.

        Only new rows are computed, in pieces, which bounds temporary memory. Pieces begin and end at multiples of 512
        rows, so every row is computed by the same vector instructions and has the same bits however the table grew.
        """
        assert length <= self._max_positions, "a position exceeds the model's maximum"
        num_known, (rotation, dtype) = self._num_known[geometry], geometry
        stop = -(-max(length, 2 * num_known) // _FIRST_POSITIONS) * _FIRST_POSITIONS
        for start in range(num_known, stop, _ROTARY_PIECE):
            positions = torch.arange(start, min(start + _ROTARY_PIECE, stop), device=self.device)
            rows = rotary_table(
                positions, rotation.rotary_dim, rotation.theta, dtype, rotation.divisors, rotation.amplitude
            )
            room = max(self._max_positions - start, 0)
            for table, new in zip(self._tables[geometry], rows, strict=True):
                table[start : start + len(new)] = new[:room]
        self._num_known[geometry] = min(stop, self._max_positions)


class _Keys(NamedTuple):
    """Packed keys and values of the sequences, and the number of keys of each."""

    k_SGK: torch.Tensor
    v_SGV: torch.Tensor
    lengths: tuple[int, ...]


class PagedContext:
    """An `AttentionContext` (see `openmimo.model.context`) over an arena. A worker has one and binds it to each pass.

    A short pass (decoding, verification) stores its keys first and attends to the pages, and so does a captured pass. A
    long pass (prefill) attends to a copy of the cached keys followed by the new ones, and then stores the new keys, of
    which a sliding layer may keep only the last.

    Args:
        arena: The cache.
        rotary: Rotary tables.
        integers: The products of long passes of full layers that may be computed in int8 (None: none).
    """

    def __init__(self, arena: PageArena, rotary: RotaryRows, *, integers: Integers | None = None):
        self.routing = RoutingTape()
        self.router_loss: RouterLoss | None = None
        self.block_scores: dict[int, torch.Tensor] = {}
        self.chosen_blocks: dict[tuple[int, int], ChosenBlocks] = {}
        self._arena = arena
        self._rotary = rotary
        self._integers = integers
        self._picked: dict[_Geometry, tuple[torch.Tensor, torch.Tensor]] = {}

    def bind(self, step: PassInput, *, records_routing: bool = False) -> "PagedContext":
        """Makes this the context of a pass until the next call; returns self."""
        self.positions_T = step.positions_T
        self.routing = RoutingTape(record=records_routing)
        self._step = step
        self._lengths = step.lengths
        self._longest_query, self._longest_key = max(self._lengths), max(step.stops)
        self._reads_pages = self._longest_query <= MAX_SHORT_TOKENS or step.shape is not None
        is_contiguous = len(step.starts) == 1 and step.shape is None
        self._rotary_rows = slice(step.starts[0], step.stops[0]) if is_contiguous else step.positions_T
        self._picked.clear()
        self.block_scores, self.chosen_blocks = {}, {}
        self._sources: dict[int, _Keys] = {}
        return self

    def rotary(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, R] of the new tokens."""
        geometry = (spec.rotation, dtype)
        if geometry not in self._picked:
            cos, sin = self._rotary.tables(spec, dtype, self._longest_key)
            self._picked[geometry] = (cos[self._rotary_rows], sin[self._rotary_rows])
        return self._picked[geometry]

    def attend(self, call: AttentionCall) -> AttentionOut:
        """Attends to the cached and the new keys of each sequence, and caches the new ones."""
        owner = call.layer if call.source_layer is None else call.source_layer
        keys_XPGK, values_XPGV = self._arena.layer(owner)
        group, part = self._arena.place_of_layer[owner]
        slots = self._step.groups[group]
        assert slots is not None, "the pass was planned without this group of layers"
        pages = Pages(keys_XPGK, values_XPGV, slots.tables_BY[part])
        if self._reads_pages and slots.kept_rows is None and call.fresh is not None:
            result = update_and_attend(
                call.fresh,
                pages,
                slots.page_T[part],
                slots.offset_T,
                call.sink_N,
                query_lengths_B=self._step.query_lengths_B,
                key_lengths_B=self._step.key_lengths_B,
                longest_query=self._longest_query,
                longest_key=self._longest_key,
                window_keys=call.window_keys,
                score_block=call.score_block,
            )
        elif self._reads_pages and slots.kept_rows is None:
            q_TNK, k_TGK, v_TGV = call.heads()
            if k_TGK is not None and v_TGV is not None:
                self._store(slots, part, pages, k_TGK, v_TGV)
            result = paged_attend(
                q_TNK,
                pages,
                call.sink_N,
                query_lengths_B=self._step.query_lengths_B,
                key_lengths_B=self._step.key_lengths_B,
                longest_query=self._longest_query,
                longest_key=self._longest_key,
                window_keys=call.window_keys,
                score_block=call.score_block,
                blocks=call.blocks,
            )
        else:
            keys = self._keys(call, slots, part, pages)
            result = attend(
                call.q_TNK,
                keys.k_SGK,
                keys.v_SGV,
                call.sink_N,
                query_lengths=self._lengths,
                key_lengths=keys.lengths,
                window_keys=call.window_keys,
                score_block=call.score_block,
                blocks=call.blocks,
                integers=self._integers if call.window_keys is None else None,
            )
        if result.block_scores_TGC is not None:
            assert call.window_keys is None, "only a layer that sees every key scores blocks"
            self.block_scores[call.layer] = result.block_scores_TGC
        return result

    def _keys(self, call: AttentionCall, slots: GroupSlots, part: int, pages: Pages) -> _Keys:
        """The cached and new keys of a long pass. Stores the new ones, and keeps those of source layers for readers."""
        if call.source_layer is not None:
            return self._sources[call.source_layer]
        assert call.k_TGK is not None and call.v_TGV is not None
        keys = self._with_past(pages, call.window_keys, call.k_TGK, call.v_TGV)
        self._store(slots, part, pages, call.k_TGK, call.v_TGV)
        if call.is_source:
            self._sources[call.layer] = keys
        return keys

    def _store(self, slots: GroupSlots, part: int, pages: Pages, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> None:
        if slots.kept_rows is not None:
            k_TGK, v_TGV = k_TGK[slots.kept_rows], v_TGV[slots.kept_rows]
        store(pages, slots.page_T[part], slots.offset_T, k_TGK, v_TGV)

    def _with_past(self, pages: Pages, window_keys: int | None, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> _Keys:
        """The cached keys and values of each sequence followed by the new ones."""
        if not any(self._step.starts):
            return _Keys(k_TGK, v_TGV, self._lengths)
        keys, values, key_lengths = [], [], []
        new_spans = zip(
            self._step.starts, self._step.stops, k_TGK.split(self._lengths), v_TGV.split(self._lengths), strict=True
        )
        for row, (start, stop, k_new, v_new) in enumerate(new_spans):
            first = 0 if window_keys is None else max(start - window_keys + 1, 0)
            positions = torch.arange(first, start, device=k_new.device)
            P = pages.keys_XPGK.shape[1]
            page, offset = pages.tables_BY[row][positions // P].long(), positions % P
            keys += [read_rows(pages.keys_XPGK[page, offset], k_new.dtype), k_new]
            values += [read_rows(pages.values_XPGV[page, offset], v_new.dtype), v_new]
            key_lengths.append(stop - first)
        return _Keys(torch.cat(keys), torch.cat(values), tuple(key_lengths))


class PassResult(NamedTuple):
    """The results of a captured pass.

    Attributes:
        hidden: States of the tokens.
        logits_TV: Logits of the tokens.
        likeliest_T: `sampler.likeliest` of the logits.

    Logits of prompts are not computed here, because few are needed: these are then None.
    """

    hidden: Hidden
    logits_TV: torch.Tensor | None
    likeliest_T: torch.Tensor | None


def why_no_graphs(model: MiMo, cache_dtype: torch.dtype) -> str | None:
    """Why the passes of a model over a cache of this dtype cannot be captured; None if they can."""
    if model.device.type == "cpu":
        return "graphs need an accelerator"
    dtype = model.compute_dtype or next(model.parameters()).dtype
    if reason := triton_unavailable(False, dtype):
        return reason
    if reason := _why_not_captured(model):
        return reason
    if any(spec.score_block is not None for spec in model.config.attention_layers()):
        return "a layer computes block scores"
    if cache_dtype == torch.int8:
        return "no kernel of an accelerator reads an int8 cache in place"
    return None


def _why_not_captured(model: MiMo) -> str | None:
    """Why a product with a quantized weight waits for the host; None if none does."""
    formats = _weight_formats(model)
    if formats == {PLAIN}:
        return None
    if others := formats - {PLAIN, INT8, FP8}:
        return f"no kernel of an accelerator multiplies weights held as {', '.join(sorted(others))}"
    if model.activation_dtype == torch.float32:
        return "a weight is quantized, and the kernels for it multiply activations of 16 bits"
    if model.config.moe is not None and _experts_backend(model, 1) != "triton":
        return "one weight of an expert is quantized and the other is not, or its rows are odd"
    return None


def max_prompt_tokens(model: MiMo, cache_dtype: torch.dtype) -> int:
    """Tokens of the largest pass over prompts that can be captured: 0 if none can.

    Other kernels for prompts wait for the device, or need the lengths of the sequences on the host.
    """
    config, dtype = model.config, model.activation_dtype
    for spec in config.attention_layers():
        need = PagedNeed(2 * MAX_SHORT_TOKENS, spec.key_dim, spec.value_dim, False, dtype, cache_dtype, False)
        if PAGED_ATTENTION.choose(need)[0] != "triton_prompts":
            return 0
    if config.moe is None:
        return _MOST_PROMPT_TOKENS
    for tokens, names in ((_MOST_PROMPT_TOKENS, ("triton_grouped", "triton")), (_FEW_TOKENS, ("triton",))):
        if _experts_backend(model, tokens) in names:
            return tokens
    return 0


def _experts_backend(model: MiMo, num_tokens: int) -> str:
    """The backend of the experts of a pass over `num_tokens` tokens."""
    config, moe, formats = model.config, model.config.moe, _weight_formats(model, Experts)
    assert moe is not None
    sizes = (moe.num_experts, moe.experts_per_token, config.hidden_size, moe.expert_dim)
    expert_format = formats.pop() if len(formats) == 1 else MIXED
    return EXPERTS.choose(ExpertsNeed(num_tokens, *sizes, model.activation_dtype, False, False, expert_format))[0]


def _weight_formats(model: MiMo, kind: type[QuantizableModule] = QuantizableModule) -> set[str]:
    """The formats of the weights of the modules of a kind."""
    return {
        format_of(module.held_weight(name)) if name in module.blocks else PLAIN
        for module in model.modules()
        if isinstance(module, kind)
        for name in module.quantizable
    }


_READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@torch.no_grad()
def join_memory(model: MiMo) -> None:
    """Give plain weights that multiply one input adjacent memory, so that their products are one.

    The parameters stay. Those that share memory with other tensors are left where they are.
    """
    for module in model.modules():
        for names in _READ_TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            weights = [layer.weight for layer in layers if type(layer) is Linear and not layer.blocks]
            own_memory = all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)
            if len(weights) < len(names) or not own_memory:
                continue
            joined = torch.cat([weight.data for weight in weights])
            for weight, rows in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
                weight.data = rows


class PassGraphs:
    """The captured passes of a worker, by shape.

    Attributes:
        capture_seconds: Time that the captures took.
        max_prompt_tokens: Tokens of the largest pass over prompts that is captured.
    """

    def __init__(self, device: torch.device, run: Callable[[PassInput], PassResult], *, max_prompt_tokens: int = 0):
        """
        Args:
            device: The accelerator.
            run: Queues the work of a pass.
            max_prompt_tokens: As in the attributes.
        """
        self.max_prompt_tokens = max_prompt_tokens
        self._run = run
        self._graphs = CapturedGraphs(device)
        self._replays: dict[PassShape, Callable[[], PassResult]] = {}
        self._draft_replays: dict[tuple[PassShape, int], Callable[[], torch.Tensor]] = {}
        self._ahead_replays: dict[Hashable, Callable[[], Any]] = {}
        self.capture_seconds = 0.0

    @property
    def num_bytes(self) -> int:
        """Memory that the captures took."""
        return self._graphs.num_bytes

    @property
    def num_captured(self) -> int:
        """Captured graphs."""
        return len(self._replays) + len(self._draft_replays) + len(self._ahead_replays)

    def replay(self, step: PassInput) -> PassResult:
        """Replays a padded pass, whose tensors are those of every pass of this shape; captures it at its first use."""
        assert step.shape is not None, "only padded passes are captured"
        if step.shape not in self._replays:
            self._replays[step.shape] = self._capture(lambda: self._run(step))
        return self._replays[step.shape]()

    def replay_drafts(self, heads: tuple[HeadInput, ...], width: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Replays the padded passes of drafting heads, as `replay` does. `run` queues their work."""
        shape = heads[0].forward.shape
        assert shape is not None and width == shape.num_sequences + 1
        key = (shape, len(heads))
        if key not in self._draft_replays:
            self._draft_replays[key] = self._capture(run)
        return self._draft_replays[key]()

    def replay_ahead(self, key: Hashable, run: Callable[[], Result]) -> Result:
        """Replays a step that was planned ahead, as `replay` does. `run` queues its work; `key` has its sizes."""
        if key not in self._ahead_replays:
            self._ahead_replays[key] = self._capture(run)
        result: Result = self._ahead_replays[key]()
        return result

    def forget_ahead(self) -> None:
        """Drops the graphs of steps that were planned ahead."""
        self._ahead_replays.clear()

    def forget_drafts(self) -> None:
        """Drops the graphs of drafting heads."""
        self._draft_replays.clear()

    def _capture(self, run: Callable[[], Result]) -> Callable[[], Result]:
        start = time.perf_counter()
        replay = self._graphs.capture(run)
        self.capture_seconds += time.perf_counter() - start
        return replay


class Worker:
    """A model, its cache arena, and the newest main-model states of each sequence, which the MTP heads read.

    Each seat has a ring of states: the state of position i is in row `seat * ring_positions + i % ring_positions`.
    The ring holds at least 2 * num_drafts + 1 positions: the last head lags by num_drafts, a step adds num_drafts + 1.
    If steps with drafts are planned ahead, a text may end while a step is on its way. That one adds as many.

    Attributes:
        model: The model.
        context: The context of all its passes.
        sampling: The sampling parameters of each seat.
        ring_positions: Positions of a ring.
        graphs: The captured passes; None if none are captured.
    """

    def __init__(
        self,
        model: MiMo,
        arena: PageArena,
        *,
        num_drafts: int,
        uses_graphs: bool = False,
        max_decided: int = 0,
        integers: Integers | None = None,
        drafts_ahead: bool = False,
    ):
        """
        Args:
            model: The model.
            arena: Its cache.
            num_drafts: MTP heads that draft.
            uses_graphs: Whether padded passes are captured.
            max_decided: Entries of the decided tokens (`StepInput.decided_place`).
            integers: The products of long passes of full layers that may be computed in int8 (None: none).
            drafts_ahead: Whether steps with drafts are planned ahead.
        """
        self.model = model
        self._arena = arena
        self.context = PagedContext(arena, RotaryRows(model.device, model.config.max_positions), integers=integers)
        self._reads_pre_norm = model.config.mtp is not None and model.config.mtp.hidden == "pre_norm"
        self.ring_positions = 1 << (3 * num_drafts + 1 if drafts_ahead else 2 * num_drafts).bit_length()
        self._states_XD: torch.Tensor | None = None
        self.sampling = SamplingTable(model.config.vocab_size, model.device)
        self._decided_X = torch.zeros(max_decided, dtype=torch.int64, device=model.device)
        self.graphs: PassGraphs | None = None
        if uses_graphs:
            join_memory(model)
            prompt_tokens = max_prompt_tokens(model, arena.dtype)
            self.graphs = PassGraphs(model.device, self._pass, max_prompt_tokens=prompt_tokens)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> StepOutput:
        """Drafts, runs the main layers over the new tokens, stores their states, decides tokens and verifies drafts."""
        if step.drafting is not None:
            drafts_HW = self._draft(step.drafting.heads, step.drafting.width)
            drafts_N = drafts_HW.view(-1).index_select(0, step.drafting.sources_N)
            step.main.token_ids_T.index_copy_(0, step.drafting.rows_N, drafts_N)
        computed = self._run_main(step)
        hidden = computed.hidden
        recorded = self.context.routing.recorded
        if step.state_places_T is not None:
            states_TD = self.kept_states(hidden)
            kept_XD = self.states_memory(self._arena.num_seats)
            for head in step.prompt_heads:
                places_T1 = head.state_places_T[:, None]
                old_TD = kept_XD[head.state_places_T.clamp(min=0)]
                new_TD = states_TD[(-1 - head.state_places_T).clamp(min=0)]
                self.run_head(head.head, head.forward, torch.where(places_T1 >= 0, old_TD, new_TD))
            rows_TD = states_TD if step.state_rows_T is None else states_TD[step.state_rows_T]
            kept_XD.index_copy_(0, step.state_places_T, rows_TD)
        tokens_R = num_accepted_B = None
        logprobs_R = top_ids_RV = top_logprobs_RV = None
        if step.sampling is not None:
            likeliest_R = computed.likeliest_T
            if computed.logits_TV is None:
                states_RD = hidden.post_norm_TD
                if step.decided_rows_R is not None:
                    states_RD = states_RD[step.decided_rows_R]
                logits_RV = self.model.head(states_RD)
            else:
                logits_RV = computed.logits_TV
            table, tokens_T = self.sampling, step.main.token_ids_T[: step.main.num_tokens]
            table.update(step.sampling)
            tokens_R = decide(logits_RV, step.sampling, table, tokens_T, likeliest_R)
            if step.decided_place is not None:
                kept_R = self._decided_X[step.decided_place : step.decided_place + tokens_R.shape[0]]
                assert len(kept_R) == len(tokens_R), "graphs read this memory, so it cannot grow"
                torch.clamp(tokens_R, min=0, out=kept_R)  # the next step runs also if no token could be decided
            if step.sampling.logprob_seats_R is not None:
                logprobs_R, top_ids_RV, top_logprobs_RV = decided_logprobs(logits_RV, tokens_R, step.sampling, table)
            if step.draft_rows_BK is not None:
                num_accepted_B = count_accepted(tokens_T, tokens_R, step.draft_rows_BK)
        routing_TLA = None
        if step.records_routing:
            routing_TLA = torch.stack([recorded[layer] for layer in sorted(recorded)], dim=1)
        scores = tuple(self._score(hidden.post_norm_TD[rows.first : rows.stop], rows) for rows in step.scored)
        return StepOutput(
            tokens_R,
            num_accepted_B,
            logprobs_R,
            top_ids_RV,
            top_logprobs_RV,
            routing_TLA,
            scores,
            hidden.post_norm_TD if step.returns_states else None,
        )

    def _score(self, states_ND: torch.Tensor, rows: ScoredRows) -> PromptScores:
        """Log-probabilities after the states of a prompt."""
        if not rows.num_top_logprobs:
            return PromptScores(self.model.head.logprobs(states_ND, rows.targets_N, rows.temperature))
        vocab_size = self.model.config.vocab_size
        num_rows, num_top = max(_MAX_SCORED_NUMBERS // vocab_size, 1), min(rows.num_top_logprobs, vocab_size)
        chosen, values, ids = [], [], []
        for states_RD, targets_R in zip(states_ND.split(num_rows), rows.targets_N.split(num_rows), strict=True):
            logprobs_RV = (self.model.head(states_RD) / rows.temperature).log_softmax(dim=-1)
            chosen.append(logprobs_RV.gather(1, targets_R[:, None])[:, 0])
            top = logprobs_RV.topk(num_top, dim=-1)
            values.append(top.values)
            ids.append(top.indices)
        return PromptScores(torch.cat(chosen), torch.cat(ids), torch.cat(values))

    def _run_main(self, step: StepInput) -> PassResult:
        """Runs the main layers."""
        main = step.main
        if main.shape is None:
            context = self.context.bind(main, records_routing=step.records_routing)
            tokens_T = self.with_decided(main.token_ids_T) if step.reads_decided else main.token_ids_T
            return PassResult(self.model(tokens_T, context), None, None)
        assert self.graphs is not None and not step.records_routing
        hidden, logits_TV, likeliest_T = self.graphs.replay(main)
        pre_norm_TD, post_norm_TD = (states[: main.num_tokens] for states in (hidden.pre_norm_TD, hidden.post_norm_TD))
        kept = Hidden(pre_norm_TD=pre_norm_TD, post_norm_TD=post_norm_TD)
        if logits_TV is None or likeliest_T is None:
            return PassResult(kept, None, None)
        assert step.decided_rows_R is None, "all rows of a decoding pass are decided"
        return PassResult(kept, logits_TV[: main.num_tokens], likeliest_T[: main.num_tokens])

    def _pass(self, main: PassInput) -> PassResult:
        hidden = self.model(self.with_decided(main.token_ids_T), self.context.bind(main))
        assert main.shape is not None
        if main.shape.is_prompt:
            return PassResult(hidden, None, None)
        logits_TV = self.model.head(hidden.post_norm_TD)
        return PassResult(hidden, logits_TV, likeliest(logits_TV))

    def with_decided(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Token ids in which those of earlier steps have taken the places of their references."""
        decided_T = self._decided_X[(-1 - token_ids_T).clamp_(min=0)]
        return torch.where(token_ids_T < 0, decided_T, token_ids_T)

    @torch.inference_mode()
    def draft(self, heads: tuple[HeadInput, ...], width: int) -> torch.Tensor:
        """Only drafts, int64 [H, W], for a host that needs the drafts before the main layers run."""
        return self._draft(heads, width)

    def _draft(self, heads: tuple[HeadInput, ...], width: int) -> torch.Tensor:
        """Drafts, int64 [H, W]. Padded passes are captured: all heads of a step are one graph."""
        if not heads or heads[0].forward.shape is None:
            return self._run_heads(heads, width)
        assert self.graphs is not None, "only padded passes are captured"
        return self.graphs.replay_drafts(heads, width, lambda: self._run_heads(heads, width))

    def _run_heads(self, heads: tuple[HeadInput, ...], width: int) -> torch.Tensor:
        """Runs the drafting heads in order: drafts, int64 [H, W]. A head reads the drafts of earlier ones."""
        drafts_HB = torch.zeros(len(heads), width, dtype=torch.int64, device=self.model.device)
        assert self._states_XD is not None, "heads draft after the main layers"
        for step in heads:
            if step.draft_rows is not None:
                assert step.draft_sources is not None
                drafts = drafts_HB.view(-1).index_select(0, step.draft_sources)
                step.forward.token_ids_T.index_copy_(0, step.draft_rows, drafts)
            states_BD = self.run_head(step.head, step.forward, self._states_XD.index_select(0, step.state_places_T))
            if step.last_rows_B is not None:
                states_BD = states_BD.index_select(0, step.last_rows_B)
            tokens_B = self.model.head(states_BD).argmax(dim=-1)
            if step.sequences_B is None:
                drafts_HB[step.head] = tokens_B
            else:
                drafts_HB[step.head].index_copy_(0, step.sequences_B, tokens_B)
        return drafts_HB

    def run_head(self, head: int, forward: PassInput, states_TD: torch.Tensor) -> torch.Tensor:
        """Runs one head over its new positions; returns its states [T, D]."""
        hidden = Hidden(pre_norm_TD=states_TD, post_norm_TD=states_TD)  # the worker keeps only the one that heads read
        return self.model.mtp(head, hidden, forward.token_ids_T, self.context.bind(forward))

    def kept_states(self, hidden: Hidden) -> torch.Tensor:
        """The states that the heads read."""
        return hidden.pre_norm_TD if self._reads_pre_norm else hidden.post_norm_TD

    def states(self, seat: int, first: int, stop: int) -> torch.Tensor:
        """The stored states of positions `first` to `stop` of a sequence, [positions, D]."""
        assert self._states_XD is not None
        positions = torch.arange(first, stop, device=self.model.device)
        return self._states_XD[seat * self.ring_positions + positions % self.ring_positions]

    def states_memory(self, num_seats: int) -> torch.Tensor:
        """The memory of the states, grown to hold this many seats."""
        num_rows, states_XD = num_seats * self.ring_positions, self._states_XD
        if states_XD is None or states_XD.shape[0] < num_rows:
            size, dtype = self.model.config.hidden_size, self.model.activation_dtype
            grown_XD = torch.zeros(2 * num_rows, size, dtype=dtype, device=self.model.device)
            if states_XD is not None:
                grown_XD[: len(states_XD)] = states_XD
            self._states_XD = states_XD = grown_XD
            if self.graphs is not None:
                self.graphs.forget_drafts()  # they read the old memory
        return states_XD


def count_accepted(token_ids_T: torch.Tensor, tokens_T: torch.Tensor, draft_rows_BK: torch.Tensor) -> torch.Tensor:
    """Counts the leading drafts of each sequence that equal the decided tokens, int64 [B].

    Args:
        token_ids_T: Tokens of a pass: for each sequence its newest token, then its drafts.
        tokens_T: The token decided after each.
        draft_rows_BK: As in `StepInput`.
    """
    is_right_T = torch.zeros_like(token_ids_T, dtype=torch.bool)  # the last row decides no draft, so it stays false
    torch.eq(token_ids_T[1:], tokens_T[:-1], out=is_right_T[:-1])
    is_right_BK = is_right_T[draft_rows_BK]
    if draft_rows_BK.shape[1] == 1:
        return is_right_BK.view(-1).long()
    return is_right_BK.cumprod(dim=1).sum(dim=1)
