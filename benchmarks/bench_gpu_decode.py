"""Decoding on a GPU: the engine against transformers, and its kernels against the bytes that they must read.

    python -m benchmarks.bench_gpu_decode [--batches 1 8 32 64] [--rounds 3] [--no-write]

The model is `med` of `engine_models` with a vocabulary of 32,000 and random weights in bfloat16. A call reads a prompt
of 512 tokens for each sequence and decodes 128; its time includes the prompts. The engine replays captured graphs. Its
note gives the time of a decoding step alone, and the time until every prompt is read. The floor is the time to read the
weights once for each step: those of the experts that a batch reaches if routes are uniform, and all others. The goal
of a call is a number of tokens a second; its column has the ratio to the peer that would reach it. Sampled calls have
top-p of 0.9 and top-k of 50 at temperature 1, and log-probabilities.

Kernels have the sizes of a layer of `flash`: attention of 64 query heads to a cache of 32,768 positions (4 key/value
heads of 192 and 128 dims; with a window of 128: 8), and 256 experts of 4096 x 2048 of which a token has 8. The floor is
the bytes of the keys and values in reach, or of the experts that are hit, at the measured rate of a copy.

Predictions before the first run: a step of one sequence is bound by the 200 kernels of a graph, 0.8 ms; at 32 and 64
sequences by the weights, 1.5 times the floor. Attention at batch 32 reaches 85 % of the copy rate. Experts reach 1.35
times the floor from 4 tokens on; a single token is bound by four launches.
"""

import argparse
import gc
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.engine_models import med
from benchmarks.harness import Row, median_milliseconds, print_rows, write_rows
from openmimo.core.records import Request, SamplingParams
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.kernels.attention import Pages, paged_attend
from openmimo.kernels.operations import RoutingRule, apply_experts, route
from openmimo.model.config import ModelConfig
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.runtime.device import CapturedGraphs, resolve_device, synchronize

PROMPT, NEW = 512, 128
GOALS = {1: 1_000, 8: 6_000, 32: 16_000, 64: 20_000}  # tokens a second of a whole call
ATTENTION_GOAL, EXPERTS_GOAL = 0.85, 1.35  # share of the copy rate at batch 8 and 32; multiple of the floor
REPLAYS = 20
DRAFTS = 3
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "logprobs": True}
ATTENTION_CASES = ((1, 1, None), (8, 1, None), (32, 1, None), (32, 4, None), (32, 1, 128), (32, 4, 128))
EXPERT_TOKENS = (1, 4, 32, 128)
CONTEXT, PAGE = 32_768, 64


def main(arguments: list[str] | None = None) -> None:
    """Measures kernels and decoding, prints a table, and writes the results unless --no-write."""
    parser = argparse.ArgumentParser(prog="bench_gpu_decode", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="sequences (default: 1 8 32 64)")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each side (default: 3)")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    device = resolve_device("auto")
    if device.type == "cpu":
        parser.error("this benchmark needs an accelerator; bench_engine measures decoding on a CPU")
    with torch.inference_mode():
        rate = copy_bytes_per_ms(device)
        rows = measure_attention(device, rate) + measure_experts(device, rate)
    print(f"[{time.strftime('%H:%M:%S')}] kernels measured", flush=True)
    rows += measure_decoding(device, rate, options.batches, rounds=options.rounds)
    print_rows(rows)
    if not options.no_write:
        remark = f"A copy moves {rate * 1e-9:.2f} TB/s, bytes read plus bytes written."
        print(f"wrote {write_rows('bench_gpu_decode', rows, device=device, threads=1, remarks=(remark,))}")


def copy_bytes_per_ms(device: torch.device) -> float:
    """Bytes that a large copy reads and writes in a millisecond."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (ms,) = median_milliseconds([lambda: target.copy_(source)], rounds=20, device=device)
    return 2 * source.numel() / ms


def replayed_milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call in a captured graph, as the engine runs it: without the time of its launches."""
    replay = CapturedGraphs(device).capture(call)

    def replays() -> None:
        for _ in range(REPLAYS):
            replay()

    (ms,) = median_milliseconds([replays], rounds=10, device=device)
    return ms / REPLAYS


def measure_attention(device: torch.device, rate: float) -> list[Row]:
    """Decoding and verification of the two kinds of layers."""
    rows = []
    for batch, queries, window in ATTENTION_CASES:
        groups = 4 if window is None else 8
        pages_of_each = CONTEXT // PAGE
        memory = torch.randn(batch * pages_of_each, PAGE, groups * 320, device=device).to(torch.bfloat16)
        pages = Pages(
            memory[..., : groups * 192].unflatten(-1, (groups, 192)),
            memory[..., groups * 192 :].unflatten(-1, (groups, 128)),
            torch.randperm(batch * pages_of_each, device=device).view(batch, pages_of_each).int(),
        )
        q = torch.randn(batch * queries, 64, 192, device=device).to(torch.bfloat16)
        sink = None if window is None else torch.randn(64, device=device)
        lengths = [torch.full((batch,), value, dtype=torch.int32, device=device) for value in (queries, CONTEXT)]

        def call(q=q, pages=pages, sink=sink, lengths=lengths, queries=queries, window=window) -> object:
            return paged_attend(
                q,
                pages,
                sink,
                query_lengths_B=lengths[0],
                key_lengths_B=lengths[1],
                longest_query=queries,
                longest_key=CONTEXT,
                window_keys=window,
            )

        ms = replayed_milliseconds(call, device)
        reach = CONTEXT if window is None else window + queries - 1
        floor = batch * reach * groups * 320 * 2 / rate
        kind = "full" if window is None else f"window {window}"
        name = f"attention, {kind}, batch {batch}, {queries} queries"
        goal = f", goal {ATTENTION_GOAL:.0%}" if window is None and batch > 1 else ""
        rows.append(Row(name, ms, floor_ms=floor, note=f"{floor / ms:.0%} of the copy rate{goal}"))
        del memory, pages
    return rows


def measure_experts(device: torch.device, rate: float) -> list[Row]:
    """The router and the experts of a sparse layer at few tokens."""
    E, D, F, A = 256, 4096, 2048, 8
    gate_up = torch.randn(E, 2 * F, D, device=device, dtype=torch.bfloat16) * 0.02
    down = torch.randn(E, D, F, device=device, dtype=torch.bfloat16) * 0.02
    weight, bias = torch.randn(E, D, device=device) * 0.02, torch.zeros(E, device=device)
    rows = []
    for tokens in EXPERT_TOKENS:
        x = torch.randn(tokens, D, device=device).to(torch.bfloat16)
        ids, weights, _ = route(x, weight, bias, RoutingRule(A))
        ms = replayed_milliseconds(
            lambda x=x, ids=ids, weights=weights: apply_experts(x, ids, weights, gate_up, down), device
        )
        router_ms = replayed_milliseconds(lambda x=x: route(x, weight, bias, RoutingRule(A)), device)
        hit = ids.unique().numel()
        floor = hit * 3 * D * F * 2 / rate
        note = (
            f"{hit} experts hit, {ms / floor:.2f} x the floor, goal {EXPERTS_GOAL} x; the router takes "
            f"{1e3 * router_ms:.0f} us"
        )
        rows.append(Row(f"experts, {tokens} tokens", ms, floor_ms=floor, note=note))
    return rows


def measure_decoding(device: torch.device, rate: float, batches: list[int], *, rounds: int) -> list[Row]:
    """Whole calls of the engine and of transformers' `generate`, in turns."""
    from transformers import AutoModelForCausalLM

    config = replace(med(), vocab_size=32_000)
    with tempfile.TemporaryDirectory() as folder:
        model = MiMo(config).to(device)
        model.initialize(torch.Generator(device).manual_seed(0))
        model.to(torch.bfloat16)
        save_model(model, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    rows = []
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(0, config.vocab_size, (batch, PROMPT), generator=generator)
        config_of_engine = EngineConfig(
            speculative=False, max_sequences=64, cache_gigabytes=8.0, mixed_prefill_tokens="all"
        )
        engine = Engine(model, config=config_of_engine)
        ids = prompts.to(device)

        def generate(ids=ids) -> float:
            start = time.perf_counter()
            theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
            synchronize(device)
            return 1e3 * (time.perf_counter() - start)

        measured: list[tuple[float, ...]] = []
        for number in range(rounds + 1):
            times = (*decode(engine, prompts.tolist(), device, f"greedy {number}", GREEDY), generate())
            sampled = decode(engine, prompts.tolist(), device, f"sampled {number}", SAMPLED)
            if number:  # the first call compiles kernels and captures graphs
                measured.append((*times, *sampled))
        ours, step, prompt, peer, sampled_ms, sampled_step, _ = (
            sorted(times)[rounds // 2] for times in zip(*measured, strict=True)
        )
        floor = NEW * step_bytes(config, batch) / rate
        tokens, goal = 1e3 * batch * NEW, GOALS.get(batch)
        stats = engine.stats
        note = (
            f"{tokens / ours:.0f} against {tokens / peer:.0f} tokens/s{f', goal {goal}' if goal else ''}; a decoding "
            f"step takes {step:.2f} ms, {1e3 * batch / step:.0f} tokens/s; prompts {prompt:.1f} ms; {stats.num_graphs} "
            f"graphs of {stats.graph_bytes / 2**20:.0f} MiB in {stats.graph_seconds:.1f} s"
        )
        ratio = goal * peer / tokens if goal else None
        rows.append(Row(f"decode, batch {batch}", ours, peer, "transformers generate", floor, ratio, note))
        print(f"[{time.strftime('%H:%M:%S')}] batch {batch}: {note}", flush=True)
        note = f"{tokens / sampled_ms:.0f} tokens/s; a decoding step takes {sampled_step:.2f} ms"
        rows.append(Row(f"decode, batch {batch}, sampled", sampled_ms, floor_ms=floor, note=note))
        print(f"[{time.strftime('%H:%M:%S')}] batch {batch}, sampled: {note}", flush=True)
        del engine
        gc.collect()
        rows.append(measure_drafts(model, prompts.tolist(), device, rate))
        print(f"[{time.strftime('%H:%M:%S')}] {rows[-1].name}: {rows[-1].ours_ms:.2f} ms", flush=True)
        gc.collect()
    return rows


def measure_drafts(model: MiMo, prompts: list[list[int]], device: torch.device, rate: float) -> Row:
    """A step that drafts and verifies. The heads are random, so nearly no draft is accepted: only its time counts."""
    config, batch = model.config, len(prompts)
    engine_config = EngineConfig(num_drafts=DRAFTS, adaptive_drafts=False, cache_gigabytes=8.0)
    engine = Engine(model, config=replace(engine_config, mixed_prefill_tokens="all"))
    decode(engine, prompts, device, "warm", GREEDY)
    _, step, _ = decode(engine, prompts, device, "drafts", GREEDY)
    heads = sum(parameter.numel() for parameter in model.model.mtp.parameters()) / config.num_mtp_heads
    floor_bytes = step_bytes(config, batch * (DRAFTS + 1)) + 2 * DRAFTS * (
        heads + config.hidden_size * config.vocab_size
    )
    return Row(f"step with {DRAFTS} drafts, batch {batch}", step, floor_ms=floor_bytes / rate)


def decode(
    engine: Engine, prompts: list[list[int]], device: torch.device, name: str, options: dict[str, Any]
) -> tuple[float, float, float]:
    """Milliseconds of a whole call, of one of its decoding steps after all prompts were read, and of the prompts."""
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, seed=0, **options)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    states = []
    for index, prompt in enumerate(prompts):
        prompt[0] = int(torch.randint(0, 32_000, (1,), generator=generator))  # no call reuses the cache of another
        states.append(engine.submit(Request(f"{name}-{index}", tuple(prompt), params)))
    synchronize(device)
    start, steps, first = time.perf_counter(), 0, None
    while engine.has_work:
        engine.step()
        steps += first is not None
        if first is None and all(len(state.tokens) > PROMPT for state in states):
            synchronize(device)
            first = time.perf_counter()
    synchronize(device)
    end = time.perf_counter()
    assert first is not None
    return 1e3 * (end - start), 1e3 * (end - first) / max(steps, 1), 1e3 * (first - start)


def step_bytes(config: ModelConfig, batch: int) -> float:
    """Bytes of the bfloat16 weights that a decoding step must read, if routes are uniform."""
    moe, D = config.moe, config.hidden_size
    assert moe is not None
    total = float(D * config.vocab_size)
    hit = moe.num_experts * (1 - (1 - moe.experts_per_token / moe.num_experts) ** batch)
    for index, layer in enumerate(config.layers):
        spec = config.attention_place(index).spec
        inputs = spec.num_heads * spec.key_dim + spec.num_kv_heads * (spec.key_dim + spec.value_dim)
        total += D * (inputs + spec.num_heads * spec.value_dim)
        total += 3 * D * (config.dense_ffn_dim if layer.ffn == "dense" else hit * moe.expert_dim)
    return 2 * total


if __name__ == "__main__":
    main()
