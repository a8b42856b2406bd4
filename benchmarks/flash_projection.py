"""A decoding step of `flash` on eight cards, projected from the layers that `bench_gpu_flash` measured on one.

    python -m benchmarks.flash_projection benchmarks/results/MACHINE/DATE_bench_gpu_flash.json

A card has an eighth of the query heads, of the dense FFN and of the vocabulary, one key/value head of each layer (the
four of a full layer are on two cards each), and 32 of the 256 experts of each layer. The router is on every card.

    bytes of a card        b = weights that it reads + keys and values of its head
    time of a layer        t(kind) = fixed(kind) + slope(kind) x b / copy rate
    step                   sum of t over 1 dense, 8 full and 39 sliding layers + head + 2 x 48 x all-reduce

`fixed` and `slope` are the least-squares line through the measured rows of a kind, so a card that reads little pays
for its launches. The time of an all-reduce is an assumption: 30 us, as measured between two H100s for up to 1 MB.
Routes are uniform, and the busiest card has as many experts as the others.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

from openmimo.model.presets import flash

CARDS = 8
ALL_REDUCE_MS = 0.03
KINDS = {"full, dense": 1, "full, experts": 8, "sliding, experts": 39}
_NAME = re.compile(r"(?P<kind>.*), (?P<cache>\w+) cache, batch (?P<batch>\d+), context (?P<context>\d+), 1 queries")
_CACHE_BYTES = {"fp8": 1, "bfloat16": 2}


def main(arguments: list[str] | None = None) -> None:
    """Prints the projected step of each batch and context."""
    parser = argparse.ArgumentParser(prog="flash_projection", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="the file of bench_gpu_flash")
    result = json.loads(parser.parse_args(arguments).results.read_text())
    found = re.search(r"([\d.]+) TB/s", " ".join(result["remarks"]))
    assert found is not None, "the results state the rate of a copy"
    rate = float(found[1]) * 1e9  # bytes a millisecond
    rows = [(_NAME.fullmatch(row["name"]), row) for row in result["rows"]]
    measured = [(match, row["ours_ms"], row["floor_ms"]) for match, row in rows if match and match["kind"] in KINDS]
    lines = {}
    for kind in KINDS:
        points = [(floor, ms) for match, ms, floor in measured if match["kind"] == kind]
        slope, fixed = np.polyfit(*zip(*points, strict=True), 1)
        lines[kind] = (fixed, slope)
        print(f"{kind}: {1e3 * fixed:.0f} us + {slope:.2f} x floor, from {len(points)} rows")
    print("| cache | context | batch | floor, ms | layers, ms | all-reduce, ms | step, ms | tokens/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for match, *_ in measured:
        if match["kind"] != "full, dense":
            continue
        batch, context, cache = int(match["batch"]), int(match["context"]), match["cache"]
        head_ms = 2 * flash().hidden_size * flash().vocab_size / CARDS / rate
        floor = layers = head_ms
        for kind, count in KINDS.items():
            floor_ms = card_bytes(kind, batch, context, _CACHE_BYTES[cache]) / rate
            fixed, slope = lines[kind]
            floor, layers = floor + count * floor_ms, layers + count * (max(fixed, 0.0) + slope * floor_ms)
        reduce = 2 * sum(KINDS.values()) * ALL_REDUCE_MS
        step = layers + reduce
        cells = (f"{floor:.2f}", f"{layers:.2f}", f"{reduce:.2f}", f"{step:.2f}", f"{1e3 * batch / step:,.0f}")
        print(f"| {cache} | {context:,} | {batch} | {' | '.join(cells)} |")


def card_bytes(kind: str, batch: int, context: int, cache_bytes: int) -> float:
    """Bytes that one of the cards reads for a layer and a decoding step."""
    config = flash()
    spec = config.layers[0 if kind.startswith("full") else 1].attention
    moe, D = config.moe, config.hidden_size
    assert moe is not None
    heads = spec.num_heads // CARDS
    head_numbers = spec.key_dim + spec.value_dim
    total = float(D * (heads * spec.key_dim + head_numbers) + 2 * D * heads * spec.value_dim)
    if kind.endswith("dense"):
        total += 3 * D * config.dense_ffn_dim / CARDS
    else:
        hit = moe.num_experts * (1 - (1 - moe.experts_per_token / moe.num_experts) ** batch)
        total += 3 * D * moe.expert_dim * hit / CARDS + 4 * D * moe.num_experts
    reach = context if spec.window_keys is None else min(context, spec.window_keys)
    return total + batch * reach * head_numbers * cache_bytes


if __name__ == "__main__":
    main()
