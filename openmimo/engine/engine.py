"""The engine: requests in, tokens out, one step at a time. It runs the modules that the trainer trains.

Nothing here is global and nothing runs by itself: the caller calls `step()`, so several engines live in one process,
and weights can be changed between two steps.
"""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.records import Request
from openmimo.data.tokenizer import StreamDecoder, Tokenizer
from openmimo.engine.cache import PageArena, plan_pages
from openmimo.engine.config import EngineConfig
from openmimo.engine.prefix import PrefixCache
from openmimo.engine.request_state import RequestState, TextStream
from openmimo.engine.runner import AheadRun, DecodeRun, PrefillRun, Ranks, Runner
from openmimo.engine.scheduler import Plan, Scheduler
from openmimo.engine.speculative import DraftPolicy, step_cost
from openmimo.engine.stats import EngineStats
from openmimo.model.config import AttentionConfig, ModelConfig, active_matmul_parameters
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import entry_weight, set_weight
from openmimo.runtime.device import at_most_threads, free_memory_bytes, works_ahead

if TYPE_CHECKING:
    from openmimo.engine.structured import StructureCompiler

_SMALL_MODEL_PARAMETERS = 20_000_000  # below, waking a second CPU thread for a token takes longer than it saves
_SHARE_OF_FREE_MEMORY = 0.4
_MAX_IDLE_SESSIONS = 4096
_CACHE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


class _Flight(NamedTuple):
    """A step whose work is queued and whose results the host has not read."""

    decode: DecodeRun | AheadRun | None
    prefill: PrefillRun | None


class Engine:
    """A model that serves many requests at once.

    Args:
        model: The model. The caller owns its weights and may change them between steps (call `update_weights`).
        tokenizer: For text, stop strings and structured output. Without one, the engine handles token ids only.
        config: Settings; the defaults if None.
        ranks: The ranks that hold the other parts of `model`, with `EngineConfig.tp`.

    Raises:
        ConfigError: The settings contradict the model or the tokenizer.
    """

    def __init__(
        self,
        model: MiMo,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        ranks: Ranks | None = None,
    ):
        config = config or EngineConfig()
        if config.tp > 1 and ranks is None:
            raise ConfigError(
                f"tp is {config.tp}, but this model is whole in the memory of one process; generate, chat, serve, eval "
                "and LLM(PATH) divide a checkpoint folder among devices. Leave tp out."
            )
        self.ranks = ranks
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.num_drafts = config.drafts_for(model.config.num_mtp_heads)
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the model embeds {model.config.vocab_size}; "
                "they are not of the same checkpoint."
            )
        self.policy_version = 0
        self.eos_ids = _eos_ids(model.config, tokenizer)
        self.arena = self._new_arena()
        self.prefix = PrefixCache(self.arena) if config.prefix_cache else None
        self.scheduler = Scheduler(
            self.arena,
            self.prefix,
            config,
            num_drafts=self.num_drafts,
            on_cpu=model.device.type == "cpu",
            free_idle=self._free_idle_session,
        )
        self.stats = EngineStats.of_heads(self.num_drafts)
        self._runner = Runner(
            model,
            self.arena,
            config,
            num_drafts=self.num_drafts,
            draft_policy=self._new_draft_policy(),
            stats=self.stats,
            plans_ahead=config.plans_ahead and works_ahead(model.device),
            ranks=ranks,
        )
        self._plans_ahead = self._runner.plans_ahead
        is_small = active_matmul_parameters(model.config) < _SMALL_MODEL_PARAMETERS
        self._head_lag = self.num_drafts + 1 if self.num_drafts else 0
        self._decode_threads = 1 if is_small else torch.get_num_threads()
        self._sequences: dict[str, RequestState] = {}
        self._idle_sessions: OrderedDict[str, RequestState] = OrderedDict()
        self._busy_sessions: set[str] = set()
        self._num_arrivals = 0
        self._paused = False
        self._num_held_back = 0  # requests whose next step depends on what the host reads
        self._flight: _Flight | None = None
        self._settled: list[RequestState] = []
        self._structures: StructureCompiler | None = None
        self._structures_lock = threading.Lock()

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or `step` has results to return."""
        return bool(self._sequences or self._settled)

    @property
    def num_waiting(self) -> int:
        """Requests that have not been admitted, or were preempted."""
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold pages and take part in steps."""
        return len(self.scheduler.running)

    @property
    def captures_graphs(self) -> bool:
        """Whether passes are captured at their first use."""
        return self._runner.worker.graphs is not None

    def check(self, request: Request) -> None:
        """Raises UserError if the request can never run: empty, too long, an unknown id, a bad structure.

        Any thread may call it at any time: it reads nothing that a step changes.
        """
        ids, params, config = request.prompt_token_ids, request.params, self.model.config
        check_token_ids(ids, config, "the prompt", room=1)
        if params.stop and self.tokenizer is None:
            raise UserError("SamplingParams.stop is text, but there is no tokenizer; use stop_token_ids.")
        for name, named_ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            outside = max(named_ids, default=0)
            if outside >= config.vocab_size:
                raise ConfigError(
                    f"SamplingParams.{name} names id {outside}, but the model's ids are 0 to {config.vocab_size - 1}."
                )
        if params.routed_experts and config.moe is None:
            raise UserError("routed_experts was asked for, but the model has no experts.")
        if params.structure is not None:
            if params.ignore_eos:
                raise UserError("ignore_eos and structure contradict each other: a complete structure ends the text.")
            self._structure_compiler().check(params.structure)
        needed = self.scheduler.pages_at_most(self._max_length(request))
        if needed > self.arena.num_pages:
            raise UserError(
                f"the request may need {needed} cache pages, but there are {self.arena.num_pages}; shorten it, lower "
                "max_tokens, or give the engine more cache_gigabytes."
            )

    def submit(self, request: Request) -> RequestState:
        """Accepts a request; its tokens come from `step`. Raises UserError as `check` does, or for an id in use."""
        self.check(request)
        if request.id in self._sequences:
            raise UserError(f"a request with id {request.id!r} is running already; ids must differ.")
        if request.session is not None and request.session in self._busy_sessions:
            raise UserError(f"session {request.session!r} has a request that has not ended; wait for it.")
        params = request.params
        eos_ids = frozenset() if params.ignore_eos else self.eos_ids
        decoder = self.tokenizer and StreamDecoder(self.tokenizer, skip_special=params.skip_special_tokens)
        sequence = RequestState(
            request=request,
            tokens=list(request.prompt_token_ids),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_length=self._max_length(request),
            stop_ids=eos_ids | frozenset(params.stop_token_ids),
            arrival=self._num_arrivals,
            text=TextStream(decoder, params.stop) if decoder else None,
            structure=self._structure_compiler().start(params.structure) if params.structure else None,
            head_lengths=[0] * self.num_drafts,
            steps_by_drafts=[0] * (self.num_drafts + 1),
            accepted_by_head=[0] * self.num_drafts,
        )
        self._num_arrivals += 1
        self._sequences[request.id] = sequence
        self._num_held_back += self._holds_back(sequence)
        if request.session is not None:
            self._busy_sessions.add(request.session)
            self._continue_session(sequence)
        self.scheduler.add(sequence)
        return sequence

    def abort(self, request_id: str) -> RequestState | None:
        """Ends a request at once and frees its pages; None if there is no such request (any more).

        One that has ended, but that `step` has not returned yet, is returned as it ended. `step` then leaves it out.
        """
        settled = next((sequence for sequence in self._settled if sequence.request.id == request_id), None)
        if settled is not None:
            self._settled.remove(settled)
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return settled
        sequence.finish("abort")
        self._retire(sequence)
        if not self._sequences:
            self._flight = None  # its results are of no use, and the time until it is read says nothing
        return sequence

    def step(self) -> list[RequestState]:
        """One step. The sequences that gained tokens or ended; `take_delta` says what is new.

        Does nothing while paused, or without work. On an accelerator a call queues a step and then reads the results of
        the one before, unless a request needs them to go on (`EngineConfig.plans_ahead`).
        """
        if self._paused or not self.has_work:
            return []
        start = time.perf_counter()
        touched, self._settled = self._settled, []
        if self._plans_ahead and not self._num_held_back:
            before, self._flight = self._flight, None
            flight = self._launch(self.scheduler.plan())
            touched += self._land(before)
            self._flight = flight if self._sequences else None
        else:
            before, self._flight = self._flight, None
            touched += self._land(before)
            touched += self._run(self.scheduler.plan())
        self.stats.seconds += time.perf_counter() - start
        return list(dict.fromkeys(touched))

    def pause(self) -> None:
        """Stops serving: `step` does nothing until `resume`. Requests keep their pages."""
        self._settle()
        self._paused = True

    def resume(self) -> None:
        """Continues after `pause`."""
        self._paused = False

    @torch.no_grad()
    def update_weights(
        self, tensors: Mapping[str, torch.Tensor] | None, *, version: int, recompute: bool = True
    ) -> None:
        """Replaces weights between two steps, while requests run.

        Cached prefixes and idle sessions are dropped. The new values of quantized weights are quantized.

        Args:
            tensors: New values by parameter name, for any subset; None if the caller has changed the model in place.
            version: Policy version of every token from now on.
            recompute: Compute the running requests again with the new weights (their tokens stay). Otherwise they
                continue with the keys and values of the old weights.

        Raises:
            UserError: The model has no parameter of that name or shape, or no tensors are given for a model on several
                devices, which nothing can change in place. Nothing is changed.
        """
        if tensors is None and self.ranks is not None:
            raise UserError("update_weights: a model on several devices is not changed in place; give the tensors.")
        for name, tensor in (tensors or {}).items():
            shape = self._weight_shape(name)
            if shape != tuple(tensor.shape):
                shown = "no such parameter" if shape is None else shape
                raise UserError(f"update_weights: {name} has shape {tuple(tensor.shape)}; the model has {shown}.")
        self._settle()
        if self.ranks is not None:
            self.ranks.set_weights(tensors or {})
        else:
            for name, tensor in (tensors or {}).items():
                set_weight(self.model, name, tensor)
        self.policy_version = version
        self.forget_cached()
        if recompute:
            self.scheduler.restart()

    def _weight_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter or buffer of the whole model; None if it has none of that name."""
        if self.ranks is not None:
            return self.ranks.whole_shape(name)
        held = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        weight = entry_weight(self.model, name, held[name]) if name in held else None
        return None if weight is None else tuple(weight.shape)

    def end_session(self, session: str) -> None:
        """Releases the pages of an idle session, which gets no more turns. Does nothing if there is none."""
        sequence = self._idle_sessions.pop(session, None)
        if sequence is not None:
            self._release(sequence)

    def forget_cached(self) -> None:
        """Releases every page that no running request holds."""
        if self.prefix is not None:
            self.prefix.clear()
        while self._free_idle_session():
            pass

    def forget_acceptance(self) -> None:
        """Forgets which drafts were accepted and how long steps took, on which the number of drafts depends."""
        self._runner.use_draft_policy(self._new_draft_policy())

    def _new_draft_policy(self) -> DraftPolicy:
        cost = step_cost(self.model.config)
        return DraftPolicy(self.num_drafts, adaptive=self.config.adaptive_drafts, cost=cost)

    def reset_stats(self) -> None:
        """Sets all counters to zero."""
        self.stats.reset()

    def _run(self, plan: Plan) -> list[RequestState]:
        """Runs a step and waits for its results. Returns the sequences that gained tokens or ended."""
        touched: list[RequestState] = []
        if plan.decodes:
            with at_most_threads(self._decode_threads):
                touched += self._runner.finish_decode(self._runner.decode(plan.decodes, self.policy_version))
        if plan.prefills:
            touched += self._runner.finish_prefill(self._runner.prefill(plan.prefills, self.policy_version))
        self._after(touched, [sequence for sequence, _ in plan.prefills])
        return touched

    def _launch(self, plan: Plan) -> _Flight:
        """Queues the work of a step."""
        decode = prefill = None
        if plan.decodes:
            decode = self._runner.decode_ahead(plan.decodes, self.policy_version)
        if plan.prefills:
            prefill = self._runner.prefill(plan.prefills, self.policy_version)
            self._after([], prefill.sequences)  # requests of the next step may share these pages
        return _Flight(decode, prefill)

    def _land(self, flight: _Flight | None) -> list[RequestState]:
        """Reads the results of a queued step. Returns the sequences that gained tokens or ended."""
        touched: list[RequestState] = []
        if flight is None:
            return touched
        if flight.decode is not None:
            touched += self._runner.finish_decode(flight.decode)
        if flight.prefill is not None:
            touched += self._runner.finish_prefill(flight.prefill)
        self._after(touched, [])
        return touched

    def _settle(self) -> None:
        """Reads the results of a queued step; the next `step` returns them."""
        flight, self._flight = self._flight, None
        self._settled += self._land(flight)

    def _after(self, touched: list[RequestState], read: list[RequestState]) -> None:
        for sequence in dict.fromkeys(touched + read):
            if sequence.pages is None:  # preempted while its step was on its way
                continue
            if self.prefix is not None and sequence.node is not None:
                self.prefix.extend(sequence)
                if sequence in read and sequence.num_uncomputed_tokens <= 1:
                    self.prefix.mark_end(sequence.node)
            # The heads have not read the positions of this step yet.
            sequence.held_pages.leave_behind(sequence.num_computed_tokens - self._head_lag)
        finished = [sequence for sequence in touched if sequence.finish_reason]
        if finished:
            self.stats.observe_cache(self.arena, self.scheduler.running)
        for sequence in finished:
            self._retire(sequence)

    def _holds_back(self, sequence: RequestState) -> bool:
        """Whether a step with this request waits for the results of the one before."""
        # Which draft a change of logits applies to depends on how many were accepted.
        return not sequence.may_run_ahead or (self.num_drafts > 0 and sequence.params.changes_logits)

    def _retire(self, sequence: RequestState) -> None:
        del self._sequences[sequence.request.id]
        self._num_held_back -= self._holds_back(sequence)
        self.stats.num_cached_tokens += sequence.num_cached_tokens
        self.scheduler.remove(sequence)
        session = sequence.request.session
        self._busy_sessions.discard(session)
        if session is not None and sequence.finish_reason not in ("abort", "error") and sequence.pages is not None:
            self._idle_sessions[session] = sequence
            while len(self._idle_sessions) > _MAX_IDLE_SESSIONS:
                self._free_idle_session()
            return
        if self.prefix is not None:
            self.prefix.mark_end(sequence.node)
            self.prefix.prune(sequence.node)
        self._release(sequence)

    def _release(self, sequence: RequestState) -> None:
        routing = sequence.routing
        sequence.forget_computed()
        sequence.routing = routing

    def _continue_session(self, sequence: RequestState) -> None:
        """Takes over the pages of the session's earlier turn if this prompt continues its tokens."""
        session = sequence.request.session
        earlier = None if session is None else self._idle_sessions.pop(session, None)
        if earlier is None:
            return
        known = earlier.tokens[: earlier.num_computed_tokens]
        has_routing = earlier.params.routed_experts or not sequence.params.routed_experts
        continues = len(sequence.tokens) > len(known) and sequence.tokens[: len(known)] == known
        if not continues or not has_routing or sequence.params.reads_whole_prompt:
            self._release(earlier)
            return
        sequence.pages, earlier.pages = earlier.pages, None
        sequence.num_computed_tokens = sequence.num_cached_tokens = earlier.num_computed_tokens
        sequence.states_start, sequence.head_lengths = earlier.states_start, earlier.head_lengths
        if sequence.params.routed_experts:
            sequence.routing = earlier.routing.continued()

    def _free_idle_session(self) -> bool:
        if not self._idle_sessions:
            return False
        _, sequence = self._idle_sessions.popitem(last=False)
        self._release(sequence)
        return True

    def _max_length(self, request: Request) -> int:
        return min(len(request.prompt_token_ids) + request.params.max_tokens, self.model.config.max_positions)

    def _structure_compiler(self) -> "StructureCompiler":
        if self.tokenizer is None:
            raise UserError("structured output was asked for, but there is no tokenizer; give one.")
        with self._structures_lock:
            if self._structures is None:
                from openmimo.engine.structured import StructureCompiler  # its library is only needed here

                self._structures = StructureCompiler(self.tokenizer, self.model.config.vocab_size, self.eos_ids)
            return self._structures

    def _new_arena(self) -> PageArena:
        layers = self.model.config.attention_layers()[: len(self.model.config.layers) + self.num_drafts]
        name = "int8" if self.config.cache_dtype == "auto" and self.config.integers else self.config.cache_dtype
        dtype = _CACHE_DTYPES.get(name, self.model.activation_dtype)
        free_bytes = free_memory_bytes(self.model.device) if self.ranks is None else self.ranks.free_bytes
        if self.config.cache_gigabytes is not None:
            cache_bytes = int(self.config.cache_gigabytes * 2**30)
            if cache_bytes > free_bytes:
                raise ConfigError(
                    f"EngineConfig.cache_gigabytes is {self.config.cache_gigabytes:g}, but only "
                    f"{free_bytes / 2**30:.2f} GiB of memory are free."
                )
        else:
            useful_bytes = _most_useful_bytes(layers, dtype, self.model.config, self.config)
            cache_bytes = min(int(_SHARE_OF_FREE_MEMORY * free_bytes), useful_bytes)
        return PageArena(
            layers,
            cache_bytes=cache_bytes,
            dtype=dtype,
            device=self.model.device,
            page_positions=self.config.page_positions,
        )


def check_token_ids(token_ids: tuple[int, ...], config: ModelConfig, where: str, *, room: int) -> None:
    """Raises UserError for no tokens, more than leave `room` positions, or what is no id of the vocabulary."""
    if not token_ids:
        raise UserError(f"{where} is empty; give at least one token.")
    if set(map(type, token_ids)) != {int}:
        wrong = next(token for token in token_ids if type(token) is not int)
        raise UserError(f"{where} holds {wrong!r}, a {type(wrong).__name__}; token ids are whole numbers.")
    if len(token_ids) + room > config.max_positions:
        raise UserError(
            f"{where} has {len(token_ids)} tokens, but the model has {config.max_positions} positions; shorten it."
        )
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= config.vocab_size:
        outside = low if low < 0 else high
        raise UserError(f"{where} holds id {outside}, but the model's ids are 0 to {config.vocab_size - 1}.")


def _most_useful_bytes(
    layers: tuple[AttentionConfig, ...], dtype: torch.dtype, model: ModelConfig, config: EngineConfig
) -> int:
    """Bytes for `max_sequences` of the longest texts, doubled to leave room for cached prefixes."""
    layout = plan_pages(layers, config.page_positions, dtype=dtype)
    pages = sum(
        group.pages_until(min(model.max_positions, 2 * (group.spec.keep_positions or model.max_positions) + 64))
        + 2 * group.num_parts
        for group in layout.groups
    )
    return 2 * config.max_sequences * pages * layout.page_numbers * dtype.itemsize


def _eos_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The end-of-text ids of checkpoint and tokenizer."""
    of_config = config.token_ids.get("eos_token_id")
    ids = [] if of_config is None else of_config if isinstance(of_config, list) else [of_config]
    return frozenset(ids) | frozenset(tokenizer.eos_token_ids if tokenizer else ())
