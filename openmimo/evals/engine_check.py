"""Compare the engine at length with a whole pass of the model: `openmimo eval --engine-check PATH --length L`.

An error beyond some length looks like a weak model. This check separates the two, and random weights suffice for it.
The reference is one pass over random tokens, with attention and rotation written out here: a dense masked softmax with
the window of the config, and a rotation by `position x frequency`. Against it stand, in sampled rows,

    one chunk     log-probabilities of a prompt that is read at once
    chunks        those of a prompt that is read in chunks
    decoding      those of the tokens after it
    prefix        the next token after prompts of many lengths, each of which reuses the cache of the shorter ones
    cache         keys and values in the pages, at both ends of every page
    rotation      the engine's tables of cosines and sines, for each kind of layer

Rows are grouped by powers of two of the position. A fault is a group in which too many rows differ by more than the
limit: single rows may differ, because rounding can change the experts of a token. The report names the first group, so
an error that begins at 32K shows as such.

T tokens, S keys, N query heads, G key/value heads, K key dim, V value dim, D model dim, R rotated dims.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.records import Completion, Request, SamplingParams
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.request_state import RequestState
from openmimo.engine.worker import RotaryRows
from openmimo.evals.config import EvalConfig
from openmimo.kernels.attention import AttentionOut
from openmimo.model.attention import AttentionConfig, kv_spec
from openmimo.model.context import AttentionCall, RouterLoss, RoutingTape
from openmimo.model.hf import load_config, load_model
from openmimo.model.mimo import MiMo

DECODED = 64
_CHUNK = 512
_ROWS_PER_OCTAVE = 24
_SHARE_OF_WRONG_ROWS = 0.2
_BLOCK_NUMBERS = 1 << 24  # logits of the reference that are held at once
# The largest differences by the narrower dtype of activations and cache: of log-probabilities, and of cached numbers as
# a share of the largest.
_LIMITS = {
    torch.float64: (1e-8, 1e-8),
    torch.float32: (2e-4, 2e-4),
    torch.float16: (0.05, 0.02),
    torch.bfloat16: (0.25, 0.1),
    torch.float8_e4m3fn: (1.0, 0.2),
}


@dataclass(frozen=True)
class Row:
    """One comparison: the position, and the absolute difference by which engine and reference differ there."""

    position: int
    difference: float


@dataclass(frozen=True)
class Finding:
    """The result of one part of the check.

    Attributes:
        name: What was compared.
        rows: Number of compared rows.
        worst: The largest difference.
        limit: The largest allowed difference.
        wrong: First and last position of the first group of wrong rows; None if the part is right.
    """

    name: str
    rows: int
    worst: float
    limit: float
    wrong: tuple[int, int] | None


def judge(name: str, rows: Iterable[Row], limit: float) -> Finding:
    """Find the first power of two of positions in which too many rows differ by more than `limit`."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.position.bit_length(), []).append(row)
    wrong = None
    for number in sorted(groups):
        over = [row.position for row in groups[number] if not row.difference <= limit]
        if len(over) > _SHARE_OF_WRONG_ROWS * len(groups[number]):
            wrong = (min(over), max(over))
            break
    every = [row.difference for group in groups.values() for row in group]
    return Finding(name, len(every), max(every, default=0.0), limit, wrong)


class ReferenceContext:
    """An `AttentionContext` of one whole sequence that computes attention and rotation by their definitions.

    Args:
        model: Its config gives the geometry of every layer.
        length: Tokens.
        kept_T: Positions whose keys and values are kept for each layer.

    Attributes:
        kept: Keys and values at `kept_T` by layer.
    """

    def __init__(self, model: MiMo, length: int, kept_T: torch.Tensor):
        self.positions_T = torch.arange(length, device=model.device)
        self.routing = RoutingTape()
        self.router_loss: RouterLoss | None = None
        self.block_scores: dict[int, torch.Tensor] = {}
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._layers = model.config.attention_layers()
        self._kept_T = kept_T
        self._sources: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def rotary(self, spec: AttentionConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionContext.rotary`."""
        return rotations(spec, self.positions_T, dtype)

    def attend(self, call: AttentionCall) -> AttentionOut:
        """As `AttentionContext.attend`. The window is that of the config, not that of the call."""
        if call.k_TGK is not None and call.v_TGV is not None:
            keys, values = call.k_TGK, call.v_TGV
            self.kept[call.layer] = keys[self._kept_T], values[self._kept_T]
            if call.is_source:
                self._sources[call.layer] = keys, values
        else:
            assert call.source_layer is not None
            keys, values = self._sources[call.source_layer]
        window = self._layers[call.layer].window_keys
        out_TNV = call.q_TNK.new_empty(*call.q_TNK.shape[:2], values.shape[2])
        step = max(_BLOCK_NUMBERS // (len(keys) * call.q_TNK.shape[1]), 1)
        for start in range(0, len(keys), step):
            stop = min(start + step, len(keys))
            first = 0 if window is None else max(start - window + 1, 0)
            out_TNV[start:stop] = _attend_rows(
                call.q_TNK[start:stop], keys[first:stop], values[first:stop], call.sink_N, start - first, window
            )
        return AttentionOut(out_TNV, None)


def _attend_rows(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    offset: int,
    window: int | None,
) -> torch.Tensor:
    """Outputs [T, N, V] of queries that begin at key `offset`: a masked softmax in float32 or better."""
    (T, N, K), (S, G, _) = q_TNK.shape, k_SGK.shape
    wide = torch.promote_types(q_TNK.dtype, torch.float32)
    q_GRTK = q_TNK.to(wide).view(T, G, N // G, K).permute(1, 2, 0, 3)
    logits_GRTS = q_GRTK @ k_SGK.to(wide).permute(1, 2, 0)[:, None] * K**-0.5
    query_T1 = torch.arange(offset, offset + T, device=q_TNK.device)[:, None]
    key_S = torch.arange(S, device=q_TNK.device)
    hidden_TS = key_S > query_T1
    if window is not None:
        hidden_TS |= key_S <= query_T1 - window
    logits_GRTS.masked_fill_(hidden_TS, float("-inf"))
    highest_GRT1 = logits_GRTS.amax(-1, keepdim=True)
    if sink_N is not None:
        sinks_GRT1 = sink_N.to(wide).view(G, N // G, 1, 1)
        highest_GRT1 = torch.maximum(highest_GRT1, sinks_GRT1)
    weights_GRTS = (logits_GRTS - highest_GRT1).exp()
    total_GRT1 = weights_GRTS.sum(-1, keepdim=True)
    if sink_N is not None:
        total_GRT1 = total_GRT1 + (sinks_GRT1 - highest_GRT1).exp()
    out_GRTV = weights_GRTS / total_GRT1 @ v_SGV.to(wide).transpose(0, 1)[:, None]
    return out_GRTV.permute(2, 0, 1, 3).reshape(T, N, -1).to(q_TNK.dtype)


def rotations(
    spec: AttentionConfig, positions_T: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, R] of `position x frequency`; as everywhere, products are float32 for narrower dtypes."""
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(spec.rotary_dim // 2, device=positions_T.device, dtype=wide)
    frequencies = 1.0 / spec.rope_theta ** (2 * pairs / spec.rotary_dim)
    amplitude = 1.0
    if spec.rope_scaling is not None:
        _, _, divisors, amplitude = spec.rope_scaling.rotation(spec.rotary_dim, spec.rope_theta)
        frequencies = frequencies / torch.tensor(divisors, dtype=wide, device=positions_T.device)
    angles = torch.outer(positions_T.to(wide), frequencies)
    angles_TR = torch.cat([angles, angles], dim=1)
    return (angles_TR.cos() * amplitude).to(dtype), (angles_TR.sin() * amplitude).to(dtype)


class EngineCheck:
    """The comparison of one model with engines over it.

    Args:
        model: Any weights; random ones suffice.
        length: Tokens of the prompt.
        engine: Settings of the engines. Chunk sizes, prefix cache and drafts are set by each part.
        seed: Determines the tokens.

    Raises:
        ConfigError: The model has too few positions, or layers that the reference does not have.
    """

    def __init__(self, model: MiMo, length: int, engine: EngineConfig | None = None, seed: int = 0):
        config = model.config
        if length + DECODED > config.max_positions:
            raise ConfigError(
                f"--length {length} and {DECODED} decoded tokens exceed the {config.max_positions} positions of the "
                f"model; give at most {config.max_positions - DECODED}."
            )
        if any(spec.score_block is not None for spec in config.attention_layers()):
            raise ConfigError("the engine check has no reference for layers with block scores.")
        self.model = model
        self.length = length
        self._settings = replace(engine or EngineConfig(), max_sequences=1, speculative=None, num_drafts=None)
        generator = torch.Generator().manual_seed(seed)
        self.prompt = torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()

    @torch.inference_mode()
    def run(self, report: Callable[[str], None] = lambda text: None) -> list[Finding]:
        """Compare all parts, and return a finding for each."""
        report(f"reading {self.length} tokens in one chunk")
        whole = self._prompt_scores(self._engine(self.length))
        report("reading them in chunks, and decoding")
        chunked = self._prompt_scores(self._engine(_CHUNK))
        report("reading prompts of many lengths that share their beginnings")
        nexts = self._next_tokens(self._engine(_CHUNK))
        report("running the reference")
        self._pass([*self.prompt, *chunked.token_ids])
        dtypes = self.model.activation_dtype, self._engine(_CHUNK).arena.dtype
        limit, cache_limit = _LIMITS[min(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.float16))]
        return [
            *self._rotation_findings(),
            judge("one chunk", self._score_rows(whole), limit),
            judge("chunks", self._score_rows(chunked), limit),
            judge("decoding", self._decoded_rows(chunked), limit),
            judge("prefix", self._next_rows(nexts), limit),
            self._cache_finding(self._engine(_CHUNK), cache_limit),
        ]

    def _engine(self, chunk: int) -> Engine:
        config = replace(self._settings, prefill_tokens=chunk, mixed_prefill_tokens=chunk)
        return Engine(self.model, config=config)

    def _sampled(self, length: int) -> list[int]:
        """Positions: some of every power of two, and both sides of the borders of windows, pages and chunks."""
        generator = torch.Generator().manual_seed(1)
        found = set(range(max(length - _ROWS_PER_OCTAVE, 0), length))
        for power in range(length.bit_length()):
            low, high = 1 << power, min(2 << power, length)
            if low < high:
                found.update(torch.randint(low, high, (_ROWS_PER_OCTAVE,), generator=generator).tolist())
        windows = {spec.window_keys for spec in self.model.config.attention_layers() if spec.window_keys}
        borders = [*windows, _CHUNK, *(1 << power for power in range(length.bit_length()))]
        found.update(border + step for border in borders for step in (-1, 0, 1))
        return sorted(position for position in found if 0 < position < length)

    def _prompt_scores(self, engine: Engine) -> Completion:
        params = SamplingParams(
            max_tokens=DECODED, temperature=0.0, ignore_eos=True, logprobs=True, prompt_logprobs=True
        )
        return _completed(engine, Request("check", tuple(self.prompt), params))

    def _next_tokens(self, engine: Engine) -> list[tuple[int, int, float]]:
        """Row, token and log-probability after prompts of increasing length; all but the first reuse a prefix."""
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=True)
        found = []
        for position in self._sampled(self.length):
            answer = _completed(engine, Request(f"prefix {position}", tuple(self.prompt[: position + 1]), params))
            assert answer.logprobs is not None
            found.append((position, answer.token_ids[0], answer.logprobs[0]))
        return found

    def _pass(self, tokens: list[int]) -> None:
        """Run the reference over the tokens; keep its states, and keys and values at both ends of each page."""
        arena = self._engine(_CHUNK).arena
        size = min(group.page_positions for group in arena.layout.groups)
        ends = [position for start in range(0, self.length, size) for position in (start, start + size - 1)]
        self._kept = [position for position in ends if position < self.length]
        kept_T = torch.tensor(self._kept, device=self.model.device)
        self._context = ReferenceContext(self.model, len(tokens), kept_T)
        self._tokens_T = torch.tensor(tokens, device=self.model.device)
        self._states_TD = self.model(self._tokens_T, self._context).post_norm_TD

    def _logprobs(self, rows: Sequence[int], targets: Sequence[int]) -> list[float]:
        """The reference's log-probabilities of tokens after rows."""
        device = self.model.device
        states = self._states_TD[torch.tensor(rows, device=device)]
        found: torch.Tensor = self.model.head.logprobs(states, torch.tensor(targets, device=device))
        return found.double().tolist()

    def _rows(self, rows: Sequence[int], targets: Sequence[int], found: Sequence[float]) -> Iterator[Row]:
        for row, mine, theirs in zip(rows, self._logprobs(rows, targets), found, strict=True):
            yield Row(row, abs(mine - theirs))

    def _score_rows(self, answer: Completion) -> Iterator[Row]:
        assert answer.prompt_logprobs is not None
        rows = [row for row in self._sampled(self.length) if row < self.length - 1]
        # entry i of the scores belongs to token i + 1, after row i
        return self._rows(rows, [self.prompt[row + 1] for row in rows], [answer.prompt_logprobs[row] for row in rows])

    def _decoded_rows(self, answer: Completion) -> Iterator[Row]:
        assert answer.logprobs is not None
        first = self.length - 1
        return self._rows(range(first, first + len(answer.token_ids)), answer.token_ids, answer.logprobs)

    def _next_rows(self, nexts: list[tuple[int, int, float]]) -> Iterator[Row]:
        rows, tokens, found = zip(*nexts, strict=True)
        return self._rows(rows, tokens, found)

    def _rotation_findings(self) -> Iterator[Finding]:
        """Compare the engine's tables for each geometry. They grow with each chunk, as in an engine."""
        sampled_T = torch.tensor(self._sampled(self.length), device=self.model.device)
        layers = [spec for spec in self.model.config.attention_layers() if spec.rotary_dim]
        geometries = {spec.rotation: spec for spec in layers}
        tables = RotaryRows(self.model.device, self.model.config.max_positions)
        for rotation, spec in geometries.items():
            dtype = self.model.activation_dtype
            for length in range(_CHUNK, self.length, _CHUNK):
                tables.tables(spec, dtype, length)
            found = tables.tables(spec, dtype, self.length)
            differences = [
                (mine[sampled_T] - theirs).abs().amax(1)
                for mine, theirs in zip(found, rotations(spec, sampled_T, dtype), strict=True)
            ]
            worst = torch.maximum(*differences).tolist()
            rows = [Row(position, value) for position, value in zip(sampled_T.tolist(), worst, strict=True)]
            kinds = " and ".join(dict.fromkeys(one.kind for one in layers if one.rotation == rotation))
            yield judge(f"rotation, {kinds} layers", rows, _rotation_limit(self.length, dtype))

    def _cache_finding(self, engine: Engine, limit: float) -> Finding:
        """Compare cached keys and values with those of the reference, relative to their size."""
        state = engine.submit(Request("cache", tuple(self.prompt), SamplingParams(max_tokens=DECODED, ignore_eos=True)))
        while state.num_uncomputed_tokens > 1:
            engine.step()
        rows = list(self._cache_rows(engine, state))
        engine.abort("cache")
        return judge("cache", rows, limit)

    def _cache_rows(self, engine: Engine, state: RequestState) -> Iterator[Row]:
        pages = state.held_pages
        for layer, kept in self._context.kept.items():
            if layer >= len(self.model.config.layers):
                continue
            group_number, part = engine.arena.place_of_layer[layer]
            group = engine.arena.layout.groups[group_number]
            table = pages.table(group_number)[:, part].tolist()
            first = pages.first_row(group_number) * group.page_positions
            keep = kv_spec(self.model.config.layers[layer].attention).keep_positions
            if keep is not None:
                first = max(first, self.length - keep)
            for number, position in enumerate(self._kept):
                if first <= position < state.num_computed_tokens:
                    page, offset = table[position // group.page_positions], position % group.page_positions
                    yield Row(position, _difference(engine.arena.layer(layer), page, offset, kept, number))


def _difference(
    stored: tuple[torch.Tensor, torch.Tensor],
    page: int,
    offset: int,
    kept: tuple[torch.Tensor, torch.Tensor],
    number: int,
) -> float:
    """The largest difference of keys or values, as a share of their largest number; infinite without a page."""
    if page < 0:
        return float("inf")
    worst = 0.0
    for mine, theirs in zip(kept, stored, strict=True):
        expected = mine[number].double()
        worst = max(worst, float((theirs[page, offset].double() - expected).abs().max() / expected.abs().max()))
    return worst


def _rotation_limit(length: int, dtype: torch.dtype) -> float:
    """Angles are products in float32 (float64 for float64), so their error grows with the position."""
    wide = torch.promote_types(dtype, torch.float32)
    return 4 * length * torch.finfo(wide).eps + 2 * torch.finfo(dtype).eps


def _completed(engine: Engine, request: Request) -> Completion:
    state = engine.submit(request)
    while engine.has_work:
        engine.step()
    answer = state.completion()
    if answer.error:
        raise UserError(f"The engine check failed at {len(request.prompt_token_ids)} tokens: {answer.error}.")
    return answer


def check_and_print(config: EvalConfig) -> None:
    """Load a checkpoint, check the engine over it, and print a table. Raises UserError if a part differs."""
    positions = load_config(config.path).max_positions
    if config.length + DECODED > positions:
        raise ConfigError(
            f"--length {config.length} and {DECODED} decoded tokens need more than the model's {positions} positions; "
            f"give at most {positions - DECODED}."
        )
    model = load_model(config.path, dtype=config.dtype, device=config.device)
    check = EngineCheck(model, config.length, config.engine, config.seed)
    findings = check.run(Console(stderr=True).print)
    table = Table("part", "rows", "largest difference", "limit", "result", title=f"engine at {config.length} tokens")
    for one in findings:
        result = "equal" if one.wrong is None else f"differs at {one.wrong[0]} to {one.wrong[1]}"
        table.add_row(one.name, str(one.rows), f"{one.worst:.2e}", f"{one.limit:.2e}", result)
    Console().print(table)
    wrong = [one for one in findings if one.wrong is not None]
    if wrong:
        parts = ", ".join(f"{one.name} (from position {one.wrong[0]})" for one in wrong if one.wrong)
        raise UserError(f"The engine differs from a whole pass of the model: {parts}.")
