"""Training and prefill on a GPU: attention, experts, token loss, whole steps, against floors and peers of the same run.

    python -m benchmarks.bench_gpu_train [--rows sliding experts ...] [--backends attention:NAME experts:NAME ...]
    python -m benchmarks.bench_gpu_train --dry

Rows, with the sizes of a layer of `flash` in bfloat16:

- sliding: forward and backward of attention with a window of 128 and sinks, 4,096 and 32,768 tokens. The peer is
  compiled FlexAttention with the sink applied to its output.
- full: causal attention of 4 key/value heads at the same lengths. The peer is cuDNN through torch's SDPA.
- packs: 32,768 tokens as equal documents and as unequal ones. The peer of the unequal pack is the equal one, with its
  time scaled by the FLOPs.
- experts: 256 experts, 8 a token, 4,096 and 32,768 tokens, forward and backward. The peer is torch's grouped product
  on sorted tokens, products alone. The note has the memory beyond inputs and outputs.
- loss: the token loss with gradients. The peer is its three products alone.
- prefill: one prompt of 1,024 and 8,192 tokens through the engine, for the model `med`. The peer is transformers.
- train: forward and backward of `small`, 8 rows of 4,096 tokens, tokens/s and GiB. The peer is transformers (eager).
- memory: the same with each option of `ActivationConfig`; the note has measured and predicted bytes.
- medium: forward and backward of `medium`, with the share of the measured rate of products.
- fp8: the same with the products of the layers in FP8; the peer is the row before, measured again.
- longest: one row of `small` with 1,048,576 tokens, recomputed layers and chunks; only if it is named.

The floor is the larger of the bytes at the measured rate of a copy and the FLOPs at the measured rate of an 8192^3
product. Times are those of queued calls, so a launch counts only where it takes longer than its kernel. A backward time
is that of forward and backward minus that of forward.

A row that fails or takes longer than `--seconds`, peers apart, gives a remark with the error, and the next row runs.
After an error that leaves the accelerator unusable, the other rows run in a new process. Results are written after
every row.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.engine_models import med
from benchmarks.harness import Row, print_rows, write_rows
from openmimo.core.records import Request, SamplingParams
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.kernels.attention import ATTENTION, AttentionNeed
from openmimo.kernels.operations import EXPERTS, ExpertsNeed, token_loss
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.config import ActivationConfig, ModelConfig, training_flops_per_token
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.heads import micro_batch
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import medium as medium_preset
from openmimo.model.presets import small, tiny
from openmimo.model.weight_formats import train_float8
from openmimo.parallel.plan import MASTER_BYTES, MeshSizes, kept_parameters
from openmimo.parallel.step_memory import options as memory_options
from openmimo.parallel.step_memory import step_bytes
from openmimo.runtime.device import measured_matmul_flops, peak_memory_bytes, resolve_device, synchronize
from openmimo.train.loss import training_loss

Call = Callable[[], Any]
GIB = 2**30
WINDOW = 128
TRAIN_GOAL, PREFILL_GOALS = 600_000, (120_000, 400_000)  # tokens/s
MEMORY_GOAL_GIB = 14
SLIDING_GOALS_MS = {4096: (0.12, 0.40), 32_768: (0.75, 2.4)}
EXPERTS_GOALS_MS = {4096: 5.5, 32_768: 24.0}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the rows.

    Attributes:
        lengths: Tokens of attention and experts.
        heads: Query heads, key/value heads of sliding and of full layers, key and value dims.
        experts: Experts, experts of a token, model dim, hidden dim.
        loss: Tokens, model dim, vocabulary.
        model: The model of training rows.
        prefill: The model of prefill.
        medium: The model of the rows medium and fp8.
        rows: Rows of a training step.
        row_length: Their tokens.
        prompts: Tokens of the prompts of prefill.
        longest: Tokens of the longest row.
        rounds: Timed rounds; the median counts.
        busy_ms: Time of the queued calls of a round.
    """

    lengths: tuple[int, ...] = (4096, 32_768)
    heads: tuple[int, int, int, int, int] = (64, 8, 4, 192, 128)
    experts: tuple[int, int, int, int] = (256, 8, 4096, 2048)
    loss: tuple[int, int, int] = (8192, 4096, 152_576)
    model: ModelConfig = small()
    prefill: ModelConfig = replace(med(), vocab_size=32_000)
    medium: ModelConfig = medium_preset()
    rows: int = 8
    row_length: int = 4096
    prompts: tuple[int, ...] = (1024, 8192)
    longest: int = 1 << 20
    rounds: int = 5
    busy_ms: float = 30.0


SHALLOW = replace(tiny(), layers=tiny().layers[:2])
DRY = Sizes(
    lengths=(64,), heads=(4, 2, 1, 24, 16), experts=(4, 2, 64, 32), loss=(32, 64, 96), model=SHALLOW, prefill=SHALLOW,
    medium=SHALLOW, rows=2, row_length=48, prompts=(24,), longest=128, rounds=1, busy_ms=0.0,
)  # fmt: skip


class TooLongError(Exception):
    """A row took longer than its limit."""


@dataclass(frozen=True)
class Bench:
    """What the rows share.

    Attributes:
        device: The device.
        dtype: Dtype of the activations.
        sizes: Sizes of the rows.
        copy_rate: Bytes that a copy reads and writes in a millisecond.
        product_rate: FLOPs of a large product in a millisecond.
        backends: Names of backends to measure in addition, by operation.
        has_peers: Whether peers are measured.
        peer_seconds: Limit of a peer, which does not count for its row.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    copy_rate: float
    product_rate: float
    backends: dict[str, tuple[str, ...]]
    has_peers: bool
    peer_seconds: int = 40

    def floor(self, *, num_bytes: float, flops: float) -> float:
        """Milliseconds of the bytes or of the FLOPs."""
        return max(num_bytes / self.copy_rate, flops / self.product_rate)

    def random(self, *shape: int, std: float = 1.0, grad: bool = True) -> torch.Tensor:
        """A random tensor that needs a gradient."""
        made = torch.empty(shape, device=self.device, dtype=self.dtype).normal_(std=std)
        return made.requires_grad_(grad)

    def milliseconds(self, call: Call) -> float:
        """Median time of one of several queued calls, after two that compile."""
        for _ in range(2):
            call()
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        once = 1e3 * (time.perf_counter() - start)
        count = max(1, int(self.sizes.busy_ms / max(once, 1e-3)))
        times = []
        for _ in range(self.sizes.rounds):
            start = time.perf_counter()
            for _ in range(count):
                call()
            synchronize(self.device)
            times.append(1e3 * (time.perf_counter() - start) / count)
        return statistics.median(times)

    def both_ways(self, forward: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> tuple[float, float]:
        """Times of forward (that saves what backward needs), and of backward."""
        gradient = torch.ones_like(forward())

        def both() -> None:
            torch.autograd.grad(forward(), inputs, gradient)

        ahead = self.milliseconds(forward)
        return ahead, max(self.milliseconds(both) - ahead, 1e-6)

    def peer(self, measure: Callable[[], tuple[float, ...]]) -> tuple[tuple[float, ...] | None, str]:
        """Times of a peer, and the error of one that fails."""
        if not self.has_peers:
            return None, ""
        left = signal.alarm(self.peer_seconds)
        try:
            return measure(), ""
        except Exception as error:  # of any kind: a peer that fails must not lose our own figures
            return None, f"; the peer failed: {_first_line(error)}"
        finally:
            signal.alarm(left)


# --- attention -------------------------------------------------------------------------------------------------------


def sliding(bench: Bench) -> Iterator[Row]:
    """Attention with a window and sinks."""
    N, G, _, K, V = bench.sizes.heads
    for length in bench.sizes.lengths:
        q, k, v = (bench.random(length, heads, dims) for heads, dims in ((N, K), (G, K), (G, V)))
        sink = bench.random(N)
        seen = sum(min(position + 1, WINDOW) for position in range(length))
        peer, failed = bench.peer(lambda: _flex(bench, q, k, v, sink))  # noqa: B023
        goals = SLIDING_GOALS_MS.get(length, (None, None))
        yield from _attention_rows(
            bench,
            f"sliding {length}",
            (q, k, v, sink),
            (length,),
            WINDOW,
            seen,
            goals,
            (peer, "flex_attention"),
            failed,
        )


def full(bench: Bench) -> Iterator[Row]:
    """Causal attention without a window."""
    N, _, G, K, V = bench.sizes.heads
    for length in bench.sizes.lengths:
        q, k, v = (bench.random(length, heads, dims) for heads, dims in ((N, K), (G, K), (G, V)))
        peer, failed = bench.peer(lambda: _sdpa(bench, q, k, v))  # noqa: B023
        seen = length * (length + 1) // 2
        yield from _attention_rows(
            bench, f"full {length}", (q, k, v), (length,), None, seen, (None, None), (peer, "cuDNN SDPA"), failed
        )


def packs(bench: Bench) -> Iterator[Row]:
    """Full attention of equal and of unequal documents."""
    N, _, G, K, V = bench.sizes.heads
    total = bench.sizes.lengths[-1]
    equal = (total // 8,) * 8
    shares = (0.31, 0.02, 0.17, 0.05, 0.22, 0.01, 0.13)
    unequal = tuple(int(total * share) for share in shares)
    unequal = (*unequal, total - sum(unequal))
    q, k, v = (bench.random(total, heads, dims) for heads, dims in ((N, K), (G, K), (G, V)))
    work: dict[str, int] = {}
    found: dict[str, list[float]] = {}
    for name, lengths in (("equal", equal), ("unequal", unequal)):
        work[name] = sum(length * (length + 1) // 2 for length in lengths)
        scaled = [ms * work[name] / work["equal"] for ms in found["equal"]] if found else None
        peer = (tuple(scaled) if scaled else None, "the equal pack, scaled by FLOPs")
        rows = list(
            _attention_rows(bench, f"{name} pack", (q, k, v), lengths, None, work[name], (None, None), peer, "")
        )
        found[name] = [row.ours_ms for row in rows[:2]]
        yield from rows


def _attention_rows(
    bench: Bench,
    name: str,
    inputs: tuple[torch.Tensor, ...],
    lengths: tuple[int, ...],
    window: int | None,
    seen: int,
    goals: tuple[float | None, float | None],
    peer: tuple[tuple[float, ...] | None, str],
    remark: str,
) -> Iterator[Row]:
    """Forward and backward of the chosen backend and of those that are named."""
    q, k, v, *rest = inputs
    sink = rest[0] if rest else None
    N, K, G, V = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    need = AttentionNeed(
        query_lengths=lengths, key_lengths=lengths, num_heads=N, num_kv_heads=G, key_dim=K, value_dim=V,
        window_keys=window, has_sink=sink is not None, needs_gradients=True, dtype=q.dtype,
        on_cpu=q.device.type == "cpu",
    )  # fmt: skip
    flops = 2.0 * seen * N * (K + V)
    moved = (sum(tensor.numel() for tensor in (q, k, v)) + q.shape[0] * N * V) * q.element_size()
    floors = bench.floor(num_bytes=moved, flops=flops), bench.floor(num_bytes=2 * moved, flops=2.5 * flops)
    for backend in (ATTENTION.choose(need)[0], *bench.backends.get("attention", ())):
        chosen = _backend(ATTENTION, backend, need)

        def forward(chosen: Any = chosen) -> torch.Tensor:
            return chosen.run(q, k, v, sink, need=need, scale=K**-0.5).out_TNV

        times = bench.both_ways(forward, inputs)
        for way, ms, floor, goal, theirs, work in zip(
            ("forward", "backward"), times, floors, goals, peer[0] or (None, None), (flops, 2.5 * flops), strict=True
        ):
            note = f"{backend}; {work / ms * 1e-9:.0f} TFLOP/s" + (f"; goal {goal} ms" if goal else "") + remark
            yield Row(f"{name} {way}", ms, theirs, peer[1] if theirs else "", floor, note=note)


def _backend(dispatcher: Any, name: str, need: Any) -> Any:
    """A backend by name. Raises ValueError if it refuses the call."""
    backends = dict(dispatcher.backends())
    if name not in backends:
        raise ValueError(f"there is no backend {name!r}; there are {', '.join(backends)}")
    if reason := backends[name].refuse(need):
        raise ValueError(f"backend {name!r} refuses the call: {reason}")
    return backends[name]


def _flex(bench: Bench, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> tuple[float, float]:
    """Compiled FlexAttention; the sink scales its output by sigmoid(lse - sink)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[0]

    def is_seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < WINDOW)

    mask = create_block_mask(is_seen, None, None, length, length, device=str(bench.device))
    compiled: Any = torch.compile(flex_attention) if bench.device.type != "cpu" else flex_attention
    heads = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]

    def forward() -> torch.Tensor:
        out, lse = compiled(*heads, block_mask=mask, enable_gqa=True, return_lse=True)
        return out * torch.sigmoid(lse - sink[:, None].float()).to(out.dtype)[..., None]

    return bench.both_ways(forward, (q, k, v, sink))


def _sdpa(bench: Bench, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
    """Torch's SDPA with cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    queries, keys, values = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    kinds = [SDPBackend.MATH] if bench.device.type == "cpu" else [SDPBackend.CUDNN_ATTENTION]

    def forward() -> torch.Tensor:
        with sdpa_kernel(kinds):
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)

    return bench.both_ways(forward, (q, k, v))


# --- experts and loss ------------------------------------------------------------------------------------------------


def experts(bench: Bench) -> Iterator[Row]:
    """Experts at many tokens."""
    E, A, D, hidden = bench.sizes.experts
    gate_up, down = bench.random(E, 2 * hidden, D, std=0.02), bench.random(E, D, hidden, std=0.02)
    for length in bench.sizes.lengths:
        x = bench.random(length, D)
        ids = torch.rand(length, E, device=bench.device).topk(A).indices
        weights = torch.rand(length, A, device=bench.device).requires_grad_()
        need = ExpertsNeed(length, E, A, D, hidden, bench.dtype, True, bench.device.type == "cpu")
        flops = 6.0 * length * A * D * hidden
        moved = 2 * x.nbytes + gate_up.nbytes + down.nbytes
        peer, failed = bench.peer(lambda: _grouped_products(bench, gate_up, down, length * A))  # noqa: B023
        for backend in (EXPERTS.choose(need)[0], *bench.backends.get("experts", ())):
            chosen = _backend(EXPERTS, backend, need)

            def forward(
                chosen: Any = chosen, x: Any = x, ids: Any = ids, weights: Any = weights, need: Any = need
            ) -> Any:
                return chosen.run(x, ids, weights, gate_up, down, need=need)

            ahead, back = bench.both_ways(forward, (x, weights, gate_up, down))
            beyond = _beyond(bench, forward, x.nbytes)
            goal = EXPERTS_GOALS_MS.get(length)
            note = f"{backend}; {flops / ahead * 1e-9:.0f} TFLOP/s; temporaries {beyond / GIB:.2f} GiB, inputs and "
            note += f"outputs {2 * x.nbytes / GIB:.2f} GiB" + (f"; goal {goal} ms" if goal else "") + failed
            floors = bench.floor(num_bytes=moved, flops=flops), bench.floor(num_bytes=2 * moved, flops=2 * flops)
            theirs = peer[0] if peer else None
            yield Row(f"experts {length} forward", ahead, theirs, "grouped_mm" if peer else "", floors[0], note=note)
            note = f"{backend}; {2 * flops / back * 1e-9:.0f} TFLOP/s"
            yield Row(f"experts {length} backward", back, floor_ms=floors[1], note=note)


def _grouped_products(bench: Bench, gate_up: torch.Tensor, down: torch.Tensor, rows: int) -> tuple[float]:
    """The two grouped products on sorted rows, nothing else."""
    E, D, hidden = down.shape
    ends = torch.arange(1, E + 1, device=bench.device, dtype=torch.int32) * (rows // E)
    with torch.no_grad():
        x, y = bench.random(rows // E * E, D, grad=False), bench.random(rows // E * E, hidden, grad=False)

        def products() -> None:
            F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends)
            F.grouped_mm(y, down.transpose(1, 2), offs=ends)

        return (bench.milliseconds(products),)


def _beyond(bench: Bench, forward: Call, output_bytes: int) -> float:
    """Bytes at the peak of a call without gradients, beyond those before it and its output; 0 on a CPU."""
    if bench.device.type == "cpu":
        return 0.0
    with torch.no_grad():
        before, peak = _used_and_peak(bench.device, forward)
    return peak - before - output_bytes


def _used_and_peak(device: torch.device, call: Call) -> tuple[int, int]:
    """Bytes in use before a call, and at its peak."""
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    call()
    synchronize(device)
    return before, peak_memory_bytes(device)


def loss(bench: Bench) -> Iterator[Row]:
    """The token loss with the gradients of states and weight."""
    T, D, V = bench.sizes.loss
    hidden, weight = bench.random(T, D), bench.random(V, D, std=0.02)
    labels = torch.randint(0, V, (T,), device=bench.device)
    weights = torch.full((T,), 1.0 / T, device=bench.device)
    logits = bench.random(min(T, 1024), V, grad=False)

    def step() -> None:
        torch.autograd.grad(token_loss(hidden, weight, labels, weights), (hidden, weight))

    def products() -> None:
        with torch.no_grad():
            for start in range(0, T, len(logits)):
                part = hidden[start : start + len(logits)]
                torch.mm(part, weight.T, out=logits[: len(part)])
                logits[: len(part)] @ weight
                logits[: len(part)].T @ part

    ours = bench.milliseconds(step)
    peer, failed = bench.peer(lambda: (bench.milliseconds(products),))
    floor = bench.floor(num_bytes=2 * weight.nbytes, flops=6.0 * T * D * V)
    note = f"{T} tokens, vocabulary {V}" + failed
    yield Row("token loss", ours, peer[0] if peer else None, "three products" if peer else "", floor, 0.85, note)


# --- models ----------------------------------------------------------------------------------------------------------


def _model(bench: Bench, config: ModelConfig) -> MiMo:
    model = MiMo(config).to(bench.device)
    model.initialize(torch.Generator(bench.device).manual_seed(0))
    return model


def _theirs(model: MiMo) -> Any:
    """The same model in transformers, eager."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.activation_dtype)
        return loaded.to(model.device)


def prefill(bench: Bench) -> Iterator[Row]:
    """One prompt until its first token."""
    model = _model(bench, bench.sizes.prefill).to(bench.dtype).eval().requires_grad_(False)
    theirs: list[Any] = []
    for number, length in enumerate(bench.sizes.prompts):
        settings = EngineConfig(speculative=False, prefix_cache=False, prefill_tokens=max(length, 16))
        engine = Engine(model, config=settings)
        prompt = torch.randint(0, model.config.vocab_size, (length,)).tolist()
        names = iter(range(1 << 30))

        def ours(engine: Engine = engine, prompt: list[int] = prompt, names: Iterator[int] = names) -> None:
            params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
            engine.submit(Request(f"prompt-{next(names)}", tuple(prompt), params))
            while engine.has_work:
                engine.step()

        def measure(prompt: list[int] = prompt) -> tuple[float]:
            if not theirs:
                theirs.append(_theirs(model))
            ids = torch.tensor([prompt], device=bench.device)
            with torch.no_grad():
                return (bench.milliseconds(lambda: theirs[0](ids, logits_to_keep=1)),)

        ms = bench.milliseconds(ours)
        peer, failed = bench.peer(measure)
        flops = training_flops_per_token(model.config, length) / 3 * length
        goal = PREFILL_GOALS[min(number, 1)]
        note = f"{1e3 * length / ms:,.0f} tokens/s"
        note += (f" against {1e3 * length / peer[0]:,.0f}" if peer else "") + f"; goal {goal:,}" + failed
        floor = bench.floor(num_bytes=2.0 * sum(p.numel() for p in model.parameters()), flops=flops)
        yield Row(f"prefill {length}", ms, peer[0] if peer else None, "transformers" if peer else "", floor, note=note)


def _step_of(model: MiMo, lengths: tuple[int, ...]) -> Call:
    """A function that runs forward and backward on random tokens."""
    config, device = model.config, model.device
    batch = micro_batch(torch.randint(0, config.vocab_size, (sum(lengths),)), lengths, None, config.num_mtp_heads)
    batch, counts = batch.to(device), batch.label_counts().to(device)

    def step() -> None:
        context = PackedContext(
            lengths, device=device, routing=RoutingTape(record=True), balance_weight=1e-5, balance_length=lengths[0]
        )
        total, _ = training_loss(model, batch, context, label_counts=counts, mtp_weight=0.3)
        total.backward()

    return step


def _train_row(
    bench: Bench,
    name: str,
    config: ModelConfig,
    activations: ActivationConfig,
    recompute: bool,
    lengths: tuple[int, ...],
    *,
    is_float8: bool = False,
) -> Row:
    """Tokens/s and GiB of forward and backward, with the predicted GiB."""
    model = _model(bench, config).train()
    if is_float8:
        train_float8(model)
    model.compute_dtype = bench.dtype
    checkpoint_activations(model.model, activations, recompute=recompute)
    step, tokens = _step_of(model, lengths), sum(lengths)
    ms = bench.milliseconds(step)
    predicted = step_bytes(config, activations, recompute=recompute, activation_bytes=bench.dtype.itemsize)
    weights = 2 * kept_parameters(config, MeshSizes()) * MASTER_BYTES  # with gradients; there is no optimizer
    expected = predicted.device * tokens + predicted.fixed + weights
    note = f"{1e3 * tokens / ms:,.0f} tokens/s"
    if bench.device.type != "cpu":
        note += f", {_used_and_peak(bench.device, step)[1] / GIB:.1f} GiB"
    note += f", predicted {expected / GIB:.1f} GiB"
    flops = training_flops_per_token(config, lengths[0]) * tokens
    note += f"; {flops / ms / bench.product_rate:.0%} of the rate of a product"
    return Row(name, ms, floor_ms=flops / bench.product_rate, note=note)


def train(bench: Bench) -> Iterator[Row]:
    """A training step of `small` without optimizer."""
    sizes = bench.sizes
    lengths = (sizes.row_length,) * sizes.rows
    row = _train_row(bench, "train", sizes.model, ActivationConfig(), False, lengths)
    gc.collect()
    peer, failed = bench.peer(lambda: _train_theirs(bench))
    tokens = sum(lengths)
    note = row.note + f"; goal {TRAIN_GOAL:,} tokens/s, {MEMORY_GOAL_GIB} GiB"
    if peer:
        note += f"; transformers {1e3 * tokens / peer[0]:,.0f} tokens/s, {peer[1]:.1f} GiB"
    yield replace(row, peer_ms=peer[0] if peer else None, peer="transformers eager" if peer else "", note=note + failed)
    as_one = _train_row(bench, "train, one row", sizes.model, ActivationConfig(), False, (tokens,))
    yield as_one


def _train_theirs(bench: Bench) -> tuple[float, float]:
    """Milliseconds and GiB of the same step in transformers, in bfloat16."""
    sizes = bench.sizes
    model = _model(bench, replace(sizes.model, mtp=None)).to(bench.dtype)
    theirs = _theirs(model).train()
    ids = torch.randint(0, sizes.model.vocab_size, (sizes.rows, sizes.row_length), device=bench.device)

    def step() -> None:
        theirs(ids, labels=ids, use_cache=False).loss.backward()

    ms = bench.milliseconds(step)
    return ms, (_used_and_peak(bench.device, step)[1] / GIB if bench.device.type != "cpu" else 0.0)


def memory(bench: Bench) -> Iterator[Row]:
    """The same with each option of what is kept."""
    sizes = bench.sizes
    for activations, recompute in memory_options():
        name = f"train, {activations.recompute if recompute else 'nothing'} recomputed"
        name += f", {activations.ffn_chunks} chunks" if activations.ffn_chunks > 1 else ""
        name += ", offload" if activations.offload else ""
        yield _train_row(bench, name, sizes.model, activations, recompute, (sizes.row_length,) * sizes.rows)
        gc.collect()


def medium(bench: Bench) -> Iterator[Row]:
    """A step of the 1.3B model with half of the rows."""
    lengths = (bench.sizes.row_length,) * max(bench.sizes.rows // 2, 1)
    yield _train_row(bench, "train medium", bench.sizes.medium, ActivationConfig(), False, lengths)


def fp8(bench: Bench) -> Iterator[Row]:
    """The same step with products in FP8, against bfloat16."""
    lengths = (bench.sizes.row_length,) * max(bench.sizes.rows // 2, 1)
    plain = _train_row(bench, "bfloat16", bench.sizes.medium, ActivationConfig(), False, lengths)
    gc.collect()
    row = _train_row(bench, "train medium, fp8", bench.sizes.medium, ActivationConfig(), False, lengths, is_float8=True)
    note = f"{row.note}; the predicted memory is that of bfloat16; bfloat16: {plain.note}"
    yield replace(row, peer_ms=plain.ours_ms, peer="bfloat16", note=note)


def longest(bench: Bench) -> Iterator[Row]:
    """One very long row."""
    config = ActivationConfig(recompute="layers", ffn_chunks=16)
    bench = replace(bench, sizes=replace(bench.sizes, rounds=1, busy_ms=0.0))
    yield _train_row(bench, "longest row", bench.sizes.model, config, True, (bench.sizes.longest,))


MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    measure.__name__: measure
    for measure in (sliding, full, packs, experts, loss, prefill, train, memory, medium, fp8, longest)
}
DEFAULT = [name for name in MEASURES if name != "longest"]


# --- the run ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Measures the rows, prints a table, and writes the results unless --no-write. Returns the number of failures."""
    parser = argparse.ArgumentParser(prog="bench_gpu_train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=MEASURES, help=f"what is measured (default: {' '.join(DEFAULT)})")
    parser.add_argument("--backends", nargs="+", default=[], help="OPERATION:NAME, such as attention:triton_training")
    parser.add_argument("--seconds", type=int, default=120, help="limit of a row (default: 120)")
    parser.add_argument("--peer-seconds", type=int, default=40, help="limit of a peer (default: 40)")
    parser.add_argument("--no-peers", action="store_true", help="measure no peers")
    parser.add_argument("--dry", action="store_true", help="toy sizes, in float32, on any device; writes nothing")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--after", type=Path, help="results of the rows before, which are kept")
    options = parser.parse_args(arguments)
    device = resolve_device("auto")
    if device.type == "cpu" and not options.dry:
        parser.error("this benchmark needs an accelerator; --dry runs it at toy sizes")
    names = options.rows or (list(MEASURES) if options.dry else DEFAULT)
    bench = _open(parser, options, device)
    results = Results.after(options.after)
    forced = ", ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("OPENMIMO_"))
    rates = f"A copy moves {bench.copy_rate * 1e-9:.2f} TB/s; a product, {bench.product_rate * 1e-9:.0f} TFLOP/s."
    results.remarks.append(f"{rates} Environment: {forced or 'nothing set'}.")
    for number, name in enumerate(names):
        is_lost = _measure(bench, name, results, options.seconds)
        gc.collect()
        if not options.dry and not options.no_write:
            path = results.write(device, options.out)
            if is_lost and names[number + 1 :]:
                return _go_on(options, names[number + 1 :], path)
    print_rows(results.rows)
    return results.failures


@dataclass
class Results:
    """What has been measured so far.

    Attributes:
        rows: The rows.
        remarks: Rates, and the errors of rows that failed.
        failures: Rows that failed.
    """

    rows: list[Row]
    remarks: list[str]
    failures: int = 0

    @classmethod
    def after(cls, path: Path | None) -> "Results":
        """The results of a process before this one."""
        if path is None:
            return cls([], [])
        found = json.loads(path.read_text())
        names = {field.name for field in fields(Row)}
        rows = [Row(**{name: value for name, value in row.items() if name in names}) for row in found["rows"]]
        return cls(rows, found["remarks"], sum(": failed after " in remark for remark in found["remarks"]))

    def write(self, device: torch.device, folder: Path | None) -> Path:
        """Writes all that there is."""
        return write_rows(
            "bench_gpu_train", self.rows, device=device, threads=1, remarks=tuple(self.remarks), folder=folder
        )


def _measure(bench: Bench, name: str, results: Results, seconds: int) -> bool:
    """Measures one row. Returns whether the accelerator is lost."""
    start = time.perf_counter()
    try:
        with _limit(seconds):
            for row in MEASURES[name](bench):
                results.rows.append(row)
                print(f"[{time.strftime('%H:%M:%S')}] {row.name}: {row.ours_ms:.3f} ms; {row.note}", flush=True)
    except Exception as error:  # of any kind: the other rows are worth having
        traceback.print_exc()
        results.failures += 1
        results.remarks.append(f"{name}: failed after {time.perf_counter() - start:.0f} s: {_first_line(error)}")
        return isinstance(error, torch.AcceleratorError)
    return False


def _go_on(options: argparse.Namespace, names: list[str], path: Path) -> int:
    """Measures the other rows in a new process."""
    command = [sys.executable, "-m", "benchmarks.bench_gpu_train", "--rows", *names, "--after", str(path)]
    command += ["--seconds", str(options.seconds), "--peer-seconds", str(options.peer_seconds)] + (
        ["--backends", *options.backends] if options.backends else []
    )
    command += (["--no-peers"] if options.no_peers else []) + (["--out", str(options.out)] if options.out else [])
    return subprocess.run(command, check=False).returncode


def _open(parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device) -> Bench:
    named: dict[str, tuple[str, ...]] = {}
    for text in options.backends:
        operation, _, name = text.partition(":")
        if operation not in ("attention", "experts") or not name:
            parser.error(f"--backends {text}: give attention:NAME or experts:NAME")
        named[operation] = (*named.get(operation, ()), name)
    sizes = DRY if options.dry else Sizes()
    dtype = torch.float32 if options.dry else torch.bfloat16
    if options.dry:
        copies, products = 1e7, 1e7
    else:
        from benchmarks.bench_gpu_kernels import copy_bytes_per_ms

        copies, products = copy_bytes_per_ms(device), measured_matmul_flops(device, dtype) / 1e3
    return Bench(device, dtype, sizes, copies, products, named, not options.no_peers, options.peer_seconds)


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raises TooLongError in the block after some seconds."""

    def stop(number: int, frame: object) -> None:
        raise TooLongError(f"longer than its limit ({seconds} s for a row)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


if __name__ == "__main__":
    sys.exit(main())
