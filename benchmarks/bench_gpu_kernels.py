"""Kernels of decoding on a GPU with the sizes of a layer of `flash`, against the bytes that they must move.

    python -m benchmarks.bench_gpu_kernels [--only experts] [--no-write]

Every time is that of a call in a captured graph, so no launch on the host counts. The floor is the bytes that a call
must read and write, at the measured rate of a large copy. A copy writes half of its bytes; a kernel that only reads can
be faster than this floor.

- Attention: 64 query heads, 4 key/value heads of 192 and 128 dims, pages of 32 positions in a shuffled order.
- A sliding layer: 8 key/value heads, a window of 128, pages of 16. The peer is the same work in separate kernels:
  rotation, value scale, store, attention.
- Experts: 256 of 4096 x 2048, of which a token has 8. The peer is torch's grouped product on sorted tokens (bfloat16).
- Linear layers with fp8 weights (128 x 128 scales): the projections of a layer. The peer is torch's product in
  bfloat16, which reads twice the bytes.
- FlashInfer, if it is installed: attention with keys and values of 128 dims, which its kernel needs.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import Row, print_rows, write_rows
from openmimo.kernels.attention import UPDATE, FreshHeads, Pages, paged_attend
from openmimo.kernels.operations import ADD_NORM, EXPERTS, ExpertsNeed, apply_experts, joined_linear
from openmimo.kernels.weights import FP8_BLOCK, BlockScaled
from openmimo.runtime.device import CapturedGraphs, resolve_device, synchronize

FLOAT8 = torch.float8_e4m3fn
ATTENTION_GOAL, EXPERTS_GOAL = "85% of the copy rate", "1.35 x the floor"
REPLAYS = 4  # queued before the host waits
CONTEXT = 32_768
ATTENTION_CASES = ((1, 1), (8, 1), (32, 1), (8, 4), (32, 4))  # batch, queries
EXPERT_TOKENS = (1, 4, 32, 128)
PROJECTIONS = {"q, k, v": ((12288, 768, 512), 4096), "gate, up": ((16384, 16384), 4096), "down": ((4096,), 16384)}


def main(arguments: list[str] | None = None) -> None:
    """Measures the kernels, prints a table, and writes the results unless --no-write."""
    parser = argparse.ArgumentParser(prog="bench_gpu_kernels", description=__doc__.split("\n\n")[0])
    measures = (full_layers, sliding_layers, experts, linear_layers, norms, flashinfer_attention)
    names = [measure.__name__ for measure in measures]
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="what is measured (default: all)")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    device = resolve_device("auto")
    if device.type == "cpu":
        parser.error("this benchmark needs an accelerator")
    rows: list[Row] = []
    with torch.inference_mode():
        rate = copy_bytes_per_ms(device)
        for measure in measures:
            if measure.__name__ in options.only:
                rows += measure(device, rate)
                print(f"[{time.strftime('%H:%M:%S')}] {measure.__name__}", flush=True)
    print_rows(rows)
    if not options.no_write:
        remark = (
            f"A copy moves {rate * 1e-9:.2f} TB/s, bytes read plus bytes written. Ratios to the floor are in the notes."
        )
        print(f"wrote {write_rows('bench_gpu_kernels', rows, device=device, threads=1, remarks=(remark,))}")


def copy_bytes_per_ms(device: torch.device) -> float:
    """Bytes that a large copy reads and writes in a millisecond."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(21):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() / (1e3 * sorted(times)[10])


def milliseconds(device: torch.device, call: Callable[[], object], *, calls: int = 10, rounds: int = 9) -> float:
    """Median time of one of several calls in a captured graph.

    Several replays are queued before the host waits once, so that its wait is no part of the time.
    """

    def all_calls() -> None:
        for _ in range(calls):
            call()

    replay = CapturedGraphs(device).capture(all_calls)
    replay()
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(REPLAYS):
            replay()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start) / (REPLAYS * calls))
    return sorted(times)[rounds // 2]


def row(
    name: str, ms: float, num_bytes: float, rate: float, peer_ms: float | None = None, peer: str = "", goal: str = ""
) -> Row:
    """A row with its floor and its ratio to it."""
    floor = num_bytes / rate
    note = f"{1e3 * ms:.1f} us, {ms / floor:.2f} x the floor, {floor / ms:.0%} of the copy rate"
    note += f"; goal {goal}" if goal else ""
    if peer_ms is not None:
        note += f"; the peer takes {1e3 * peer_ms:.1f} us"
    return Row(name, ms, peer_ms, peer, floor, note=note)


def codes(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Random float8 numbers, none of which is NaN."""
    bits = torch.randint(0, 1 << 30, (torch.Size(shape).numel() // 4,), dtype=torch.int32, device=device)
    return bits.view(torch.uint8).bitwise_and_(0b10111111).view(FLOAT8).view(shape)


def cache(
    batch: int, context: int, page: int, groups: int, dtype: torch.dtype, device: torch.device, key_dim: int = 192
):
    """Shuffled pages in the layout of the engine."""
    count, numbers = batch * context // page, page * groups * (key_dim + 128)
    memory = (
        torch.randn(count, numbers, device=device).to(torch.bfloat16)
        if dtype != FLOAT8
        else codes((count, numbers), device)
    )
    keys = memory.as_strided((count, page, groups, key_dim), (numbers, groups * key_dim, key_dim, 1), 0)
    offset = page * groups * key_dim
    values = memory.as_strided((count, page, groups, 128), (numbers, groups * 128, 128, 1), offset)
    return Pages(keys, values, torch.randperm(count, device=device).view(batch, -1).int())


def lengths(batch: int, queries: int, context: int, device: torch.device) -> dict:
    """The arguments of an attention call that state lengths."""
    query_lengths, key_lengths = (
        torch.full((batch,), value, dtype=torch.int32, device=device) for value in (queries, context)
    )
    return {
        "query_lengths_B": query_lengths,
        "key_lengths_B": key_lengths,
        "longest_query": queries,
        "longest_key": context,
    }


def full_layers(device: torch.device, rate: float) -> list[Row]:
    """Decoding and verification of layers without a window."""
    rows = []
    for dtype, name in ((torch.bfloat16, "bfloat16"), (FLOAT8, "float8")):
        for batch, queries in ATTENTION_CASES:
            pages = cache(batch, CONTEXT, 32, 4, dtype, device)
            q = torch.randn(batch * queries, 64, 192, device=device).to(torch.bfloat16)
            arguments = lengths(batch, queries, CONTEXT, device)
            ms = milliseconds(device, lambda: paged_attend(q, pages, None, window_keys=None, **arguments))  # noqa: B023
            num_bytes = batch * CONTEXT * 4 * 320 * dtype.itemsize
            title, goal = (
                f"attention, {name} cache, batch {batch}, {queries} queries",
                ATTENTION_GOAL if batch > 1 else "",
            )
            rows.append(row(title, ms, num_bytes, rate, goal=goal))
    return rows


def sliding_layers(device: torch.device, rate: float) -> list[Row]:
    """One kernel for a layer with a window against separate ones."""
    rows, context = [], 512
    backends = dict(UPDATE.backends())
    for dtype, name in ((torch.bfloat16, "bfloat16"), (FLOAT8, "float8")):
        for batch, queries in ((1, 1), (32, 1), (32, 4)):
            tokens = batch * queries
            pages = cache(batch, context, 16, 8, dtype, device)
            joined = torch.randn(tokens, 72 * 192 + 8 * 128, device=device).to(torch.bfloat16)
            cos, sin = (torch.randn(tokens, 64, device=device).to(torch.bfloat16) for _ in range(2))
            position = torch.arange(context - queries, context, device=device).repeat(batch)
            sequence = torch.arange(batch, device=device).repeat_interleave(queries)
            fresh = FreshHeads(joined, 64, 8, 192, 128, cos, sin, 0.707)
            places = (pages.tables_BY[sequence, position // 16].long(), position % 16)
            sink = torch.randn(64, device=device)
            arguments = lengths(batch, queries, context, device)
            ours, apart = (
                milliseconds(
                    device, lambda: backends[kind].run(fresh, pages, *places, sink, window_keys=128, **arguments)
                )  # noqa: B023
                for kind in ("triton", "reference")
            )
            num_bytes = batch * (128 + queries - 1) * 8 * 320 * dtype.itemsize
            title = f"sliding layer, {name} cache, batch {batch}, {queries} queries"
            rows.append(row(title, ours, num_bytes, rate, apart, "separate kernels"))
    return rows


def experts(device: torch.device, rate: float) -> list[Row]:
    """The experts of a sparse layer at few tokens, in each format."""
    E, D, hidden, A = 256, 4096, 2048, 8
    rows = []
    for name in ("bfloat16", "fp8", "int8"):
        weights = [_expert_weight(name, outputs, dims, device) for outputs, dims in ((2 * hidden, D), (D, hidden))]
        for tokens in EXPERT_TOKENS:
            x = torch.randn(tokens, D, device=device).to(torch.bfloat16)
            ids = torch.rand(tokens, E, device=device).topk(A).indices
            gates = torch.rand(tokens, A, device=device)
            ms = milliseconds(device, lambda: apply_experts(x, ids, gates, *weights))  # noqa: B023
            peer_ms = None
            if name == "bfloat16":
                grouped = dict(EXPERTS.backends())["grouped"]
                need = ExpertsNeed(tokens, E, A, D, hidden, x.dtype, False, False)
                peer_ms = milliseconds(device, lambda: grouped.run(x, ids, gates, *weights, need=need))  # noqa: B023
            num_bytes = ids.unique().numel() * 3 * D * hidden * (2 if name == "bfloat16" else 1)
            title, peer = f"experts, {name}, {tokens} tokens", "torch grouped_mm" if peer_ms else ""
            rows.append(row(title, ms, num_bytes, rate, peer_ms, peer, EXPERTS_GOAL))
    return rows


def _expert_weight(name: str, outputs: int, dims: int, device: torch.device) -> torch.Tensor | BlockScaled:
    if name == "bfloat16":
        return torch.empty(256, outputs, dims, device=device, dtype=torch.bfloat16).normal_(std=0.02)
    return _scaled(name, (256, outputs, dims), device)


def _scaled(name: str, shape: tuple[int, ...], device: torch.device) -> BlockScaled:
    *stack, outputs, dims = shape
    block = (FP8_BLOCK, FP8_BLOCK) if name == "fp8" else (1, dims)
    blocks = (*stack, -(-outputs // block[0]), -(-dims // block[1]))
    numbers = codes(shape, device)
    scales = torch.rand(blocks, device=device) * 1e-3
    return BlockScaled(numbers if name == "fp8" else numbers.view(torch.int8), scales, block)


def linear_layers(device: torch.device, rate: float) -> list[Row]:
    """Projections with fp8 weights."""
    rows = []
    for title, (sizes, dims) in PROJECTIONS.items():
        layers = tuple((_scaled("fp8", (outputs, dims), device), None) for outputs in sizes)
        plain = torch.randn(sum(sizes), dims, device=device).to(torch.bfloat16)
        for tokens in (1, 8, 32, 128):
            x = torch.randn(tokens, dims, device=device).to(torch.bfloat16)
            ours = milliseconds(device, lambda: joined_linear(x, layers))  # noqa: B023
            theirs = milliseconds(device, lambda: F.linear(x, plain))  # noqa: B023
            rows.append(
                row(f"linear, fp8, {title}, {tokens} tokens", ours, sum(sizes) * dims, rate, theirs, "torch bfloat16")
            )
    return rows


def norms(device: torch.device, rate: float) -> list[Row]:
    """The sum of the residual stream and its norm."""
    rows = []
    for tokens in (1, 32):
        x, added = (torch.randn(tokens, 4096, device=device).to(torch.bfloat16) for _ in range(2))
        weight = torch.randn(4096, device=device).to(torch.bfloat16)
        backends = dict(ADD_NORM.backends())
        ours, apart = (
            milliseconds(device, lambda: backends[kind].run(x, added, weight, 1e-5))  # noqa: B023
            for kind in ("triton", "reference")
        )
        rows.append(row(f"sum and norm, {tokens} tokens", ours, 4 * 2 * x.numel(), rate, apart, "separate kernels"))
    return rows


def flashinfer_attention(device: torch.device, rate: float) -> list[Row]:
    """Full attention with equal dims of keys and values against FlashInfer."""
    try:
        import flashinfer
    except ImportError as error:
        print(f"FlashInfer is left out: {error}", flush=True)
        return []
    rows = []
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    for batch in (8, 32):
        pages = cache(batch, CONTEXT, 32, 4, torch.bfloat16, device, key_dim=128)
        q = torch.randn(batch, 64, 128, device=device).to(torch.bfloat16)
        arguments = lengths(batch, 1, CONTEXT, device)
        ours = milliseconds(device, lambda: paged_attend(q, pages, None, window_keys=None, **arguments))  # noqa: B023
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
        pages_of_each = CONTEXT // 32
        wrapper.plan(
            torch.arange(batch + 1, dtype=torch.int32, device=device) * pages_of_each,
            pages.tables_BY.flatten(),
            torch.full((batch,), 32, dtype=torch.int32, device=device),
            64, 4, 128, 32, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        held = (pages.keys_XPGK.contiguous(), pages.values_XPGV.contiguous())
        theirs = milliseconds(device, lambda: wrapper.run(q, held))  # noqa: B023
        num_bytes = batch * CONTEXT * 4 * 256 * 2
        rows.append(row(f"attention, 128 dims, batch {batch}", ours, num_bytes, rate, theirs, "FlashInfer"))
    return rows


if __name__ == "__main__":
    main()
