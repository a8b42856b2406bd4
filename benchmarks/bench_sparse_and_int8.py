"""CPU cost of block scores, of reading chosen blocks, and of attention in integers; errors on a trained model.

    python -m benchmarks.bench_sparse_and_int8 [--only kernels|decode|model|mass] [--quick]

Predictions before the first run: Block scores of 64 keys cost 3 % of a prompt's attention, because a logit takes 192
multiply-adds and one comparison. Reading 1,024 of 32,768 keys takes 1/32 of the bytes, and at most 1/25 of the time.
Integers multiply four numbers where float32 multiplies one, so attention with int8 queries and keys is 1.6 times as
fast, and 3 times with int8 values.

Times are the CPU time of one thread, which other processes on the machine do not count into.
"""

import argparse
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from openmimo.core.records import SamplingParams
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.llm import LLM
from openmimo.kernels.attention import (
    ATTENTION,
    PAGED_ATTENTION,
    AttentionNeed,
    AttentionOut,
    ChosenBlocks,
    PagedNeed,
    Pages,
    attend,
    write_rows,
)
from openmimo.kernels.attention._integers import IntegerSettings, attend_in_integers
from openmimo.model.context import AttentionCall, PackedContext
from openmimo.model.hf import load_model
from openmimo.model.sparse_attention import choose_blocks

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 16, 2, 192, 128
MODEL = Path(__file__).parents[1] / "openmimo" / "assets" / "tiny-mimo"


def cpu_milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Return the smallest CPU time of this process over some calls."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times) * 1e3


def draw(T: int, S: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, HEADS, KEY_DIM), (S, KV_HEADS, KEY_DIM), (S, KV_HEADS, VALUE_DIM))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def measure_kernels(lengths: tuple[int, ...], rounds: int) -> None:
    """Print times of causal attention to a prompt: plain, with block scores, and in integers."""
    backends = dict(ATTENTION.backends())
    print(
        "causal attention, ms | float32 C | + scores 64 | + scores 16 | + scores 1 | half int8 | full int8 | bfloat16"
    )
    for length in lengths:
        need = AttentionNeed(
            (length,), (length,), HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, None, False, False, torch.float32, True
        )
        q, k, v = draw(length, length, torch.float32)
        q16, k16, v16 = (x.bfloat16() for x in (q, k, v))
        scale = KEY_DIM**-0.5
        calls = {"native": need}
        calls |= {f"scores {block}": replace(need, score_block=block) for block in (64, 16, 1)}
        calls |= {"half": replace(need, integers="half"), "full": replace(need, integers="full")}
        times = [
            cpu_milliseconds(
                lambda: backends["int8_native" if one.integers else "native"].run(q, k, v, None, need=one, scale=scale),
                rounds,
            )
            for one in calls.values()
        ]
        half_precision = replace(need, dtype=torch.bfloat16)
        name, backend = ATTENTION.choose(half_precision)
        times.append(
            cpu_milliseconds(lambda: backend.run(q16, k16, v16, None, need=half_precision, scale=scale), rounds)
        )
        print(f"{length} | " + " | ".join(f"{x:.1f}" for x in times) + f" ({name})", flush=True)


def measure_decode(lengths: tuple[int, ...], rounds: int) -> None:
    """Print times of one query with a cache: all keys, with block scores, 1,024 chosen keys, and an int8 cache."""
    native = dict(PAGED_ATTENTION.backends())["native"]
    print("one query, ms | bfloat16 | + scores 64 | 16 blocks of 64 | 1,024 tokens | float32 | int8 cache")
    for length in lengths:
        q, k, v = draw(1, length, torch.float32)
        tables = torch.arange(length // 32, dtype=torch.int32)[None]
        wide = [x.unflatten(0, (-1, 32)) for x in (k, v)]
        pages = {
            torch.bfloat16: Pages(*(x.bfloat16() for x in wide), tables),
            torch.float32: Pages(*wide, tables),
            torch.int8: Pages(*(write_rows(x) for x in wide), tables),
        }
        lengths_B = {
            "query_lengths_B": torch.ones(1, dtype=torch.int32),
            "key_lengths_B": torch.tensor([length], dtype=torch.int32),
        }

        def run(cache: torch.dtype, **options: object) -> AttentionOut:
            query = q.bfloat16() if cache == torch.bfloat16 else q
            need = PagedNeed(1, KEY_DIM, VALUE_DIM, False, query.dtype, cache, True)
            assert native.refuse(need) is None
            return native.run(
                query, pages[cache], None, **lengths_B, longest_query=1, longest_key=length, window_keys=None, **options
            )

        def chosen(size: int) -> ChosenBlocks:
            generator = torch.Generator().manual_seed(1)
            ids = torch.randperm(length // size, generator=generator)[: 1024 // size].sort().values
            return ChosenBlocks(ids.expand(1, KV_HEADS, -1).contiguous(), size)

        blocks, tokens = chosen(64), chosen(1)
        times = [
            cpu_milliseconds(call, rounds)
            for call in (
                lambda: run(torch.bfloat16),
                lambda: run(torch.bfloat16, score_block=64),
                lambda: run(torch.bfloat16, blocks=blocks),
                lambda: run(torch.bfloat16, blocks=tokens),
                lambda: run(torch.float32),
                lambda: run(torch.int8),
            )
        ]
        print(f"{length} | " + " | ".join(f"{x:.3f}" for x in times), flush=True)


class _Capturing(PackedContext):
    """Keeps the calls of full layers, or computes them in integers."""

    def __init__(self, lengths: tuple[int, ...], integers: str | None = None):
        super().__init__(lengths)
        self.integers, self.calls = integers, list[AttentionCall]()

    def attend(self, call: AttentionCall) -> AttentionOut:
        """As `PackedContext.attend`."""
        if call.window_keys is not None:
            return super().attend(call)
        self.calls.append(call)
        return attend(
            call.q_TNK,
            call.k_TGK,
            call.v_TGV,
            call.sink_N,
            query_lengths=self.document_lengths,
            key_lengths=self.document_lengths,
            window_keys=None,
            integers=self.integers,
        )


def texts_of_the_library(num_texts: int) -> torch.Tensor:
    """Return texts of Python's standard library, the pre-training text of the built-in model, int64 [texts, 1024]."""
    tokenizer = Tokenizer.load(MODEL)
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    ids = [tokenizer.encode(path.read_text(errors="replace")[:6000])[:1024] for path in files]
    return torch.tensor([tokens for tokens in ids if len(tokens) == 1024][:num_texts])


@functools.cache
def texts_of_the_model(num_texts: int) -> torch.Tensor:
    """Return texts that the built-in model samples after the first 32 tokens of texts of the library."""
    params = SamplingParams(max_tokens=992, temperature=1.0, ignore_eos=True, seed=0)
    prompts = texts_of_the_library(num_texts)[:, :32].tolist()
    answers = LLM(str(MODEL)).generate(prompts, params)
    return torch.tensor([prompt + list(answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)])


@torch.inference_mode()
def measure_model(num_texts: int) -> None:
    """Print errors on the queries, keys and values of the built-in model, and the change of its perplexity."""
    model = load_model(MODEL)
    for name, texts in (("library", texts_of_the_library(num_texts)), ("own", texts_of_the_model(num_texts))):
        losses: dict[str | None, torch.Tensor] = {}
        for integers in (None, "half", "full"):
            rows = []
            for tokens in texts:
                logits = model.head(model(tokens, _Capturing((1024,), integers)).post_norm_TD)
                rows.append(F.cross_entropy(logits[:-1], tokens[1:]))
            losses[integers] = torch.stack(rows)
            changes = losses[integers] - losses[None]
            error = changes.std() / len(texts) ** 0.5
            print(
                f"{len(texts)} texts ({name}), {integers or 'exact'}: loss {losses[integers].mean():.5f}, "
                f"perplexity {math.expm1(changes.mean()):+.3%} (standard error {error:.3%})",
                flush=True,
            )
    context = _Capturing((1024,))
    model(texts_of_the_library(1)[0], context)
    print("layer, products in int8 | relative L1 | RMSE | cosine | relative L1 without smoothing")
    for call in context.calls:
        assert call.k_TGK is not None and call.v_TGV is not None
        wide = [x.double() for x in (call.q_TNK, call.k_TGK, call.v_TGV)]
        lengths = {"query_lengths": (1024,), "key_lengths": (1024,), "window_keys": None}
        exact = attend(*wide, None, **lengths).out_TNV
        for values in ("half", "full"):
            found, rough = (
                attend_in_integers(
                    call.q_TNK,
                    call.k_TGK,
                    call.v_TGV,
                    None,
                    scale=call.q_TNK.shape[2] ** -0.5,
                    causal=True,
                    settings=IntegerSettings(values, smooth_keys=smooth),
                )[0].double()
                for smooth in (True, False)
            )
            error = ((found - exact).abs().sum() / exact.abs().sum()).item()
            without = ((rough - exact).abs().sum() / exact.abs().sum()).item()
            cosine = F.cosine_similarity(found.flatten(), exact.flatten(), 0).item()
            rmse = (found - exact).square().mean().sqrt().item()
            print(f"{call.layer}, {values} | {error:.4f} | {rmse:.2e} | {cosine:.6f} | {without:.4f}", flush=True)


@torch.inference_mode()
def measure_mass(num_texts: int) -> None:
    """Print the attention mass of the model's last full layer in blocks that are chosen by its first full layer.

    Queries are those from position 512 on. The other selections have as many blocks: those with the largest mass, the
    newest, random ones, and those whose mean key has the largest logit.
    """
    model = load_model(MODEL)
    print("blocks | reused | best | newest | random | mean key")
    for size, count in ((16, 4), (16, 8), (64, 2), (1, 64)):
        rows = []
        for tokens in texts_of_the_model(num_texts):
            context = _Capturing((1024,))
            model(tokens, context)
            first, last = context.calls
            plain = {"query_lengths": (1024,), "key_lengths": (1024,), "window_keys": None}
            scores = attend(first.q_TNK, first.k_TGK, first.v_TGV, None, **plain, score_block=size).block_scores_TGC
            rows.append(_masses(last, scores, size, count))
        print(f"{count} of {size} | " + " | ".join(f"{x:.3f}" for x in torch.tensor(rows).mean(0).tolist()), flush=True)


def _masses(call: AttentionCall, scores_TGC: torch.Tensor, size: int, count: int) -> list[float]:
    """Return the mass of each selection."""
    assert call.k_TGK is not None
    T, G = call.q_TNK.shape[0], call.k_TGK.shape[1]
    q_TGRK = call.q_TNK.unflatten(1, (G, -1))
    logits = torch.einsum("tgrk,sgk->tgrs", q_TGRK, call.k_TGK) * call.q_TNK.shape[2] ** -0.5
    hidden_TS = torch.ones(T, T, dtype=torch.bool).triu(1)
    mass_TGC = (
        logits.masked_fill(hidden_TS[:, None, None], -math.inf).softmax(-1).mean(2).unflatten(2, (-1, size)).sum(-1)
    )
    means_CGK = call.k_TGK.unflatten(0, (-1, size)).mean(1)
    by_mean_TGC = torch.einsum("tgrk,cgk->tgrc", q_TGRK, means_CGK).amax(2)
    selections = (
        scores_TGC,
        mass_TGC,
        torch.arange(1.0, mass_TGC.shape[2] + 1).expand_as(mass_TGC),
        torch.rand(mass_TGC.shape, generator=torch.Generator().manual_seed(0)),
        by_mean_TGC - by_mean_TGC.min(),
    )
    masses = []
    for ranks_TGC in selections:
        ids_TGJ = choose_blocks(ranks_TGC, torch.arange(T), size=size, count=count).ids_TGJ[512:]
        masses.append(mass_TGC[512:].gather(2, ids_TGJ).sum(-1).mean().item())
    return masses


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("kernels", "decode", "model", "mass"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if options.only in (None, "kernels"):
            measure_kernels((1024, 4096) if options.quick else (1024, 4096, 8192), 2 if options.quick else 3)
        if options.only in (None, "decode"):
            measure_decode((4096, 32768) if options.quick else (4096, 32768, 131072), 5)
    if options.only in (None, "model"):
        measure_model(4 if options.quick else 24)
    if options.only in (None, "mass"):
        measure_mass(2 if options.quick else 8)


if __name__ == "__main__":
    main()
