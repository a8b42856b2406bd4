"""Decoding on a GPU: the engine against transformers, and its kernels against the bytes that they must read.

    python -m benchmarks.bench_gpu_decode [--batches 1 8 32 64] [--rounds 3] [--no-write]

The model is `med` of `engine_models` with a vocabulary of 32,000 and random weights in bfloat16. A call reads a prompt
of 512 tokens for each sequence and decodes 128; its time includes the prompts. The engine replays captured graphs. Its
note gives the time of a decoding step alone, and the time until every prompt is read. The floor is the time to read the
weights once for each step: those of the experts that a batch reaches if routes are uniform, and all others. The goal
of a call is a number of tokens a second; its column has the ratio to the peer that would reach it. Sampled calls have
top-p of 0.9 and top-k of 50 at temperature 1, and log-probabilities.

Kernels are those of `bench_gpu_kernels` that have a goal: attention to 32,768 keys and few tokens through experts, with
the sizes of a layer of `flash`. Their peers are FlashInfer, if it is installed, and torch's grouped product.

Predictions before the first run: a step of one sequence is bound by the 200 kernels of a graph, 0.8 ms; at 32 and 64
sequences by the weights, 1.5 times the floor. Attention at batch 32 reaches 85 % of the copy rate. Experts reach 1.35
times the floor from 4 tokens on; a single token is bound by four launches.
"""

import argparse
import gc
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.bench_gpu_kernels import copy_bytes_per_ms, experts, flashinfer_attention, full_layers
from benchmarks.engine_models import med
from benchmarks.harness import Row, print_rows, write_rows
from openmimo.core.records import Request, SamplingParams
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.model.config import ModelConfig
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.runtime.device import resolve_device, synchronize

PROMPT, NEW = 512, 128
GOALS = {1: 1_000, 8: 6_000, 32: 16_000, 64: 20_000}  # tokens a second of a whole call
DRAFTS = 3
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "logprobs": True}


def main(arguments: list[str] | None = None) -> None:
    """Measures kernels and decoding, prints a table, and writes the results unless --no-write."""
    parser = argparse.ArgumentParser(prog="bench_gpu_decode", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="sequences (default: 1 8 32 64)")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each side (default: 3)")
    parser.add_argument("--peer-rounds", type=int, default=3, help="timed calls of transformers (default: 3; 0: none)")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    device = resolve_device("auto")
    if device.type == "cpu":
        parser.error("this benchmark needs an accelerator; bench_engine measures decoding on a CPU")
    rate = copy_bytes_per_ms(device)
    remark = f"A copy moves {rate * 1e-9:.2f} TB/s, bytes read plus bytes written."
    rows: list[Row] = []

    def keep(more: list[Row]) -> None:  # at once, so that a run that is cut off has results
        rows.extend(more)
        for row in more:
            print(f"[{time.strftime('%H:%M:%S')}] {row.name}: {row.ours_ms:.3f} ms; {row.note}", flush=True)
        if not options.no_write:
            write_rows("bench_gpu_decode", rows, device=device, threads=1, remarks=(remark,))

    peer_rounds = min(options.peer_rounds, options.rounds)
    for measured in measure_decoding(device, rate, options.batches, rounds=options.rounds, peer_rounds=peer_rounds):
        keep(measured)
    with torch.inference_mode():
        for measure in (full_layers, experts, flashinfer_attention):
            keep(measure(device, rate))
    print_rows(rows)


def measure_decoding(
    device: torch.device, rate: float, batches: list[int], *, rounds: int, peer_rounds: int
) -> Iterator[list[Row]]:
    """Whole calls of the engine and of transformers' `generate`, in turns: the rows of one batch after another."""
    config = replace(med(), vocab_size=32_000)
    model = MiMo(config).to(device)
    model.initialize(torch.Generator(device).manual_seed(0))
    model.to(torch.bfloat16)
    theirs = _peer_of(model) if peer_rounds else None
    for batch in batches:
        rows: list[Row] = []
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(0, config.vocab_size, (batch, PROMPT), generator=generator)
        config_of_engine = EngineConfig(
            speculative=False, max_sequences=64, cache_gigabytes=8.0, mixed_prefill_tokens="all"
        )
        engine = Engine(model, config=config_of_engine)
        measured: list[tuple[float, ...]] = []
        peer_times: list[float] = []
        for number in range(rounds + 1):
            times = decode(engine, prompts.tolist(), device, f"greedy {number}", GREEDY)
            sampled = decode(engine, prompts.tolist(), device, f"sampled {number}", SAMPLED)
            if theirs is not None and number <= peer_rounds:
                peer_times.append(generate(theirs, prompts.to(device)))
            if number:  # the first call compiles kernels and captures graphs
                measured.append((*times, *sampled))
        ours, step, prompt, sampled_ms, sampled_step, _ = (
            sorted(times)[rounds // 2] for times in zip(*measured, strict=True)
        )
        peer = sorted(peer_times[1:])[peer_rounds // 2] if peer_times else None
        floor = NEW * step_bytes(config, batch) / rate
        tokens, goal = 1e3 * batch * NEW, GOALS.get(batch)
        stats = engine.stats
        note = (
            f"{tokens / ours:.0f}{f' against {tokens / peer:.0f}' if peer else ''} tokens/s"
            f"{f', goal {goal}' if goal else ''}; a decoding step takes {step:.2f} ms, {1e3 * batch / step:.0f} "
            f"tokens/s; prompts {prompt:.1f} ms; {stats.num_graphs} graphs of {stats.graph_bytes / 2**20:.0f} MiB in "
            f"{stats.graph_seconds:.1f} s"
        )
        ratio = goal * peer / tokens if goal and peer else None
        rows.append(
            Row(f"decode, batch {batch}", ours, peer, "transformers generate" if peer else "", floor, ratio, note)
        )
        note = f"{tokens / sampled_ms:.0f} tokens/s; a decoding step takes {sampled_step:.2f} ms"
        rows.append(Row(f"decode, batch {batch}, sampled", sampled_ms, floor_ms=floor, note=note))
        del engine
        gc.collect()
        rows.append(measure_drafts(model, prompts.tolist(), device, rate))
        gc.collect()
        yield rows


def _peer_of(model: MiMo) -> Any:
    """The same model in transformers."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(model.device)


def generate(model: Any, ids_BT: torch.Tensor) -> float:
    """Milliseconds of a whole call of the peer."""
    start = time.perf_counter()
    model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    synchronize(ids_BT.device)
    return 1e3 * (time.perf_counter() - start)


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
