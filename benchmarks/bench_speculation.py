"""Speculative and plain decoding of a trained checkpoint: acceptance by head, tokens per step, speed by batch size.

    python -m benchmarks.bench_speculation CHECKPOINT [--rounds 5] [--threads 1] [--no-write]

Models with random weights accept no drafts, so this needs a checkpoint with trained heads: `runs/demo/extend/model`
(make demo), or `runs/drafts_cpu/model` (`openmimo pretrain drafts_cpu`, after the demo). There are two kinds of text:
held-out Python files, and repeated passages as in edited code. Both sides decode 128 tokens greedily from the same
prompts, interleaved.

Predictions: The cost of a step of `tiny` is the number of calls and not of bytes. Three heads of one layer each, in
addition to six layers, and more products of the output head make a drafting step at batch 1 about 1.6 times as long as
a plain one. Then 2.2 tokens per step give 1.4 times the speed, 3 give 1.9, 4 give 2.5. In larger batches rows also cost
time, and the gain is smaller.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Row, median_milliseconds, print_rows, write_rows
from openmimo.core.records import SamplingParams
from openmimo.data.config import SourceConfig
from openmimo.data.source import read_documents, split_of
from openmimo.data.tasks._needles import needle_symbols
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.llm import LLM

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 128
VALIDATION_FRACTION = 0.05  # as in recipes/tiny_cpu.py, so that the same files are held out
GOAL, GOAL_TOKENS_A_STEP = 1.8, 3.0


def python_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the beginnings of held-out files of the standard library."""
    prompts = []
    for text in read_documents(SourceConfig("python_stdlib", max_megabytes=8.0)):
        ids = tokenizer.encode(text[: 20 * PROMPT_TOKENS])
        if split_of(text, VALIDATION_FRACTION) == "validation" and len(ids) >= PROMPT_TOKENS:
            prompts.append(ids[:PROMPT_TOKENS])
    return [prompts[number % len(prompts)] for number in range(PROMPTS)]


def repeating_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Returns random passages of 20 to 31 symbols, each twice and the beginning a third time."""
    symbols = needle_symbols(tokenizer)
    alphabet = np.array(symbols.keys + symbols.values)
    rng = np.random.default_rng(0)
    passages = [rng.choice(alphabet, rng.integers(20, 32)) for _ in range(PROMPTS)]
    return [np.resize(passage, 2 * len(passage) + 5).tolist() for passage in passages]


def measure(name: str, plain: LLM, drafting: LLM, prompts: list[list[int]], rounds: int) -> list[Row]:
    """Returns a row per batch size: milliseconds per token with drafts (ours) and without (peer)."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    rows = []
    for batch in (1, 8, 32):
        groups = [prompts[start : start + batch] for start in range(0, max(batch, 8), batch)]

        def run(llm: LLM, groups: list[list[list[int]]] = groups) -> list[list[int]]:
            return [completion.token_ids for group in groups for completion in llm.generate(group, params)]

        same = run(plain) == run(drafting)
        drafting.reset_stats()
        ours, theirs = median_milliseconds([lambda: run(drafting), lambda: run(plain)], rounds=rounds)
        stats = drafting.stats()
        length = stats["accepted_tokens_per_step"]
        by_head = ", ".join(f"{share:.0%}" for share in stats["acceptance_by_head"])
        tokens = sum(map(len, groups)) * NEW_TOKENS
        rows.append(
            Row(
                f"{name}, batch {batch}, per token",
                ours / tokens,
                theirs / tokens,
                "openmimo, plain",
                goal=GOAL if batch == 1 and length >= GOAL_TOKENS_A_STEP else None,
                note=f"{length:.2f} tokens per step; by head {by_head}; {1e3 * tokens / ours:.0f} against "
                f"{1e3 * tokens / theirs:.0f} tokens/s; {'same' if same else 'other'} text",
            )
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measures both kinds of text, prints the rows and writes them to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plain, drafting = (
        LLM(options.checkpoint, speculative=speculative, device="cpu", prefix_cache=False)
        for speculative in (False, True)
    )
    rows = []
    for name, make in (("held-out Python", python_prompts), ("repeated passages", repeating_prompts)):
        rows += measure(name, plain, drafting, make(plain.tokenizer), options.rounds)
    print_rows(rows)
    if not options.no_write:
        write_rows("bench_speculation", rows, device=torch.device("cpu"), threads=options.threads)


if __name__ == "__main__":
    main()
