"""Times the kernels of training attention with several tilings on a GPU, to choose the plans of the backend.

    python -m benchmarks.attention_tilings [--warm PART PARTS] [--no-peer] [--rounds 5]

The geometry is that of `flash`: 64 query heads, keys of 192 dims, values of 128; 8 key/value heads, a window of 128 and
sinks in a sliding layer, 4 key/value heads in a full one. Each time is one of several calls in a captured graph. A
floor is the bytes that a call must read and write at the measured rate of a copy, for full layers the products at
790 TFLOP/s. The errors are those of the output and the gradients against float64.

1. Errors of the plans in use, of packs of ragged documents.
2. Each kernel with each tiling, at 4,096 and 32,768 tokens; `!` marks a result that differs from that of the first.
3. Forward and backward of the operation with packs of equal and of unequal documents, against `banded` and `sdpa`.
4. cuDNN's ragged call of full layers, which torch has no public function for, if it takes these heads.
5. flex_attention with the sink by its log-sum-exp as a peer.

`--warm 3 16` only compiles every sixteenth variant, so that sixteen processes fill the cache of Triton at once.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks.bench_gpu_kernels import copy_bytes_per_ms
from openmimo.kernels.attention import ATTENTION, AttentionNeed
from openmimo.runtime.device import CapturedGraphs, resolve_device

N, K, V, WINDOW = 64, 192, 128, 128
TOKENS = (4096, 32_768)
FLOPS_PER_MS = 790e9
UNEQUAL = (128, 8192, 256, 1024, 4096, 2048, 640, 6144, 512, 3072, 384, 5120, 1152)  # 32,768 tokens


class Layer(NamedTuple):
    """A kind of layer: key/value heads, window, and the tilings of each kernel, as arguments of `Tiling`."""

    name: str
    groups: int
    window: int | None
    tilings: dict[str, tuple[dict, ...]]


def tiling(rows: int, block: int, warps: int, stages: int = 2, **options: Any) -> dict:
    """The arguments of `Tiling`."""
    return {"rows": rows, "block": block, "warps": warps, "stages": stages, **options}


SLIDING = Layer("sliding", 8, WINDOW, {
    "forward": (
        tiling(128, 32, 8, registers=128), tiling(64, 32, 4), tiling(64, 64, 4), tiling(64, 32, 4, 3),
        tiling(64, 128, 4, unrolled=True), tiling(128, 64, 8), tiling(128, 128, 8, unrolled=True),
        tiling(256, 32, 16), tiling(128, 32, 8, descriptors=False),
    ),
    "queries": (
        tiling(64, 32, 4, 3), tiling(64, 32, 4), tiling(64, 64, 4), tiling(128, 64, 8), tiling(128, 32, 8, 3),
        tiling(64, 64, 8), tiling(64, 32, 4, descriptors=False),
    ),
    "keys": (
        tiling(32, 64, 4), tiling(32, 64, 4, 3), tiling(16, 64, 4, 3), tiling(64, 64, 8), tiling(64, 64, 8, 3),
        tiling(32, 128, 8), tiling(32, 64, 4, descriptors=False),
    ),
})  # fmt: skip
FULL = Layer("full", 4, None, {
    "forward": (tiling(128, 64, 8, 3), tiling(128, 64, 8), tiling(128, 128, 8), tiling(64, 64, 4)),
    "queries": (tiling(128, 64, 8), tiling(64, 64, 4), tiling(128, 32, 8, 3)),
    "keys": (tiling(32, 128, 8), tiling(64, 64, 8), tiling(32, 64, 4), tiling(32, 128, 8, 3)),
})  # fmt: skip
LAYERS = (SLIDING, FULL)


def main(arguments: list[str] | None = None) -> None:
    """Compiles or times the variants."""
    parser = argparse.ArgumentParser(prog="attention_tilings", description=__doc__.split("\n\n")[0])
    parser.add_argument("--warm", nargs=2, type=int, metavar=("PART", "PARTS"), help="only compile a part")
    parser.add_argument("--no-peer", action="store_true", help="without flex_attention, which compiles for 20 s")
    parser.add_argument("--rounds", type=int, default=5, help="replays of a graph; the median counts")
    options = parser.parse_args(arguments)
    device = resolve_device("auto")
    if device.type == "cpu":
        parser.error("this script needs an accelerator")
    if options.warm:
        part, parts = options.warm
        for number, (layer, kernel, choice) in enumerate(_variants()):
            if number % parts == part:
                _kernel_call(layer, (512,), kernel, choice, device)()
        torch.cuda.synchronize()
        return
    _say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    _errors(device)
    rate = copy_bytes_per_ms(device)
    _say(f"a copy moves {rate * 1e-9:.2f} TB/s")
    for tokens in TOKENS:
        _kernels(tokens, rate, device, options.rounds)
    _packs(rate, device, options.rounds)
    _ragged(device, options.rounds)
    if not options.no_peer:
        _peer(device, options.rounds)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _variants() -> Iterator[tuple[Layer, str, dict]]:
    for layer in LAYERS:
        for kernel, tilings in layer.tilings.items():
            for choice in tilings:
                yield layer, kernel, choice


def _inputs(layer: Layer, tokens: int, device: torch.device) -> list[torch.Tensor | None]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((tokens, N, K), (tokens, layer.groups, K), (tokens, layer.groups, V))
    tensors = [torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16) for shape in shapes]
    return [*tensors, torch.randn(N, device=device, generator=generator) if layer.window else None]


def _kernel_call(
    layer: Layer, lengths: tuple[int, ...], kernel: str, choice: dict, device: torch.device
) -> Callable[[], Any]:
    """A call of one kernel with one tiling, of one pack."""
    from openmimo.kernels.attention import _training as kernels

    q, k, v, sink = _inputs(layer, sum(lengths), device)
    plan = kernels.FULL_PLAN if layer.window is None else kernels.WINDOW_PLAN
    plan = replace(plan, **{kernel: kernels.Tiling(**choice)})
    documents = kernels.documents_of(lengths, device)
    ctx = SimpleNamespace(scale=K**-0.5, window_keys=layer.window, plan=plan)
    settings = {"scale": ctx.scale, "window_keys": layer.window, "plan": plan}
    if kernel == "forward":
        return lambda: kernels.attend_pack(q, k, v, sink, documents, **settings)
    out = kernels.attend_pack(q, k, v, sink, documents, **settings)
    # The gradient kernels need no exact sums of exponentials to be timed, but results are compared.
    lse = torch.full((N, len(q)), 12.0, device=device)
    if kernel == "queries":
        return lambda: kernels._query_gradients((q, k, v), sink, out, out, lse, documents, ctx)
    delta = torch.zeros_like(lse)
    return lambda: kernels._key_gradients((q, k, v), out, lse, delta, documents, ctx)


def _milliseconds(call: Callable[[], Any], device: torch.device, rounds: int, calls: int = 4) -> float:
    """Median time of one of several calls in a captured graph."""
    replay = CapturedGraphs(device).capture(lambda: [call() for _ in range(calls)])
    replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[rounds // 2]


def _floor(layer: Layer, lengths: tuple[int, ...], part: str, rate: float) -> float:
    """Milliseconds of the bytes at the rate of a copy, or of the useful products if they take longer."""
    tokens = sum(lengths)
    numbers = {
        "forward": N * (K + V) + layer.groups * (K + V),
        "queries": N * (2 * K + 2 * V) + layer.groups * (K + V),
        "keys": N * (K + V) + 2 * layer.groups * (K + V),
        "backward": N * (2 * K + 2 * V) + 2 * layer.groups * (K + V),
    }
    products = {"forward": K + V, "queries": 2 * K + V, "keys": 2 * K + 2 * V, "backward": 3 * K + 2 * V}
    seen = sum(
        length * (length + 1) / 2
        if layer.window is None or length < layer.window
        else layer.window * (layer.window + 1) / 2 + (length - layer.window) * layer.window
        for length in lengths
    )
    return max(2 * tokens * numbers[part] / rate, 2 * N * seen * products[part] / FLOPS_PER_MS)


def _kernels(tokens: int, rate: float, device: torch.device, rounds: int) -> None:
    for layer in LAYERS:
        for kernel, tilings in layer.tilings.items():
            rows, first = [], None
            for choice in tilings:
                call = _kernel_call(layer, (tokens,), kernel, choice, device)
                result = call()
                result = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
                first = first or result
                differs = any(_relative(ours, theirs) > 2e-2 for ours, theirs in zip(result, first, strict=True))
                once = layer.window is None and tokens > TOKENS[0]
                ms = _milliseconds(call, device, 2 if once else rounds, calls=1 if once else 4)
                rows.append((ms, " ".join(f"{key}={value}" for key, value in choice.items()) + " !" * differs))
            floor = _floor(layer, (tokens,), kernel, rate)
            _say(f"{layer.name}, {tokens} tokens, {kernel}: floor {1e3 * floor:.0f} us")
            for ms, name in sorted(rows):
                print(f"    {1e3 * ms:9.1f} us  {ms / floor:5.2f} x  {name}", flush=True)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-9))


def _need(layer: Layer, lengths: tuple[int, ...]) -> AttentionNeed:
    dtype = torch.bfloat16
    return AttentionNeed(
        lengths, lengths, N, layer.groups, K, V, layer.window, layer.window is not None, True, dtype, False
    )


def _errors(device: torch.device) -> None:
    lengths = (1, 700, 3, 1, 64, 129, 300)
    for layer in LAYERS:
        need = _need(layer, lengths)
        inputs = [x for x in _inputs(layer, sum(lengths), device) if x is not None]
        upstream = torch.randn(sum(lengths), N, V, device=device, dtype=torch.float64)
        found = {}
        for name in ("reference", "triton_training", "banded" if layer.window else "sdpa"):
            dtype = torch.float64 if name == "reference" else torch.bfloat16
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            sink = leaves[3] if layer.window else None
            backend = dict(ATTENTION.backends())[name]
            out = backend.run(*leaves[:3], sink, need=replace(need, dtype=dtype), scale=K**-0.5).out_TNV
            found[name] = [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]
            if name != "reference":
                pairs = zip(found[name], found["reference"], strict=True)
                errors = ", ".join(f"{_relative(ours, theirs):.1e}" for ours, theirs in pairs)
                _say(f"{layer.name}, errors of {name}: {errors} (output, q, k, v{', sink' if layer.window else ''})")


def _packs(rate: float, device: torch.device, rounds: int) -> None:
    """The operation by autograd."""
    packs = {"one of 4,096": (4096,), "one of 32,768": (32_768,), "8 of 4,096": (4096,) * 8, "unequal": UNEQUAL}
    for layer in LAYERS:
        for title, lengths in packs.items():
            for name in ("triton_training", "banded" if layer.window else "sdpa"):
                times = _forward_and_backward(layer, lengths, name, device, rounds)
                floors = [_floor(layer, lengths, part, rate) for part in ("forward", "backward")]
                shown = ", ".join(
                    f"{part} {1e3 * ms:.0f} us ({ms / floor:.2f} x the floor)"
                    for part, ms, floor in zip(("forward", "backward"), times, floors, strict=True)
                )
                _say(f"{layer.name}, {title} ({sum(lengths)} tokens), {name}: {shown}")


def _forward_and_backward(
    layer: Layer, lengths: tuple[int, ...], name: str, device: torch.device, rounds: int
) -> tuple[float, float]:
    leaves = [None if x is None else x.requires_grad_() for x in _inputs(layer, sum(lengths), device)]
    backend, need = dict(ATTENTION.backends())[name], _need(layer, lengths)
    return _pass_times(lambda: backend.run(*leaves, need=need, scale=K**-0.5).out_TNV, leaves, rounds)


def _pass_times(
    call: Callable[[], torch.Tensor], leaves: list[torch.Tensor | None], rounds: int
) -> tuple[float, float]:
    """Medians of forward and backward, without graphs: the host is ahead of the device after the first round."""
    upstream = torch.randn_like(call())
    inputs = [x for x in leaves if x is not None]
    forward, backward = [], []
    for _ in range(rounds + 1):
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host queues the launches
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        out = call()
        events[1].record()
        torch.autograd.grad(out, inputs, upstream)
        events[2].record()
        events[2].synchronize()
        forward.append(events[0].elapsed_time(events[1]))
        backward.append(events[1].elapsed_time(events[2]))
    return sorted(forward[1:])[rounds // 2], sorted(backward[1:])[rounds // 2]


def _ragged(device: torch.device, rounds: int) -> None:
    q, k, v, _ = _inputs(FULL, sum(UNEQUAL), device)
    stops = torch.tensor((0, *UNEQUAL), dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    longest = max(UNEQUAL)

    def call() -> torch.Tensor:
        flags = (True, 0.0, True, False)  # log-sum-exp, dropout, causal, debug mask
        operator = torch.ops.aten._cudnn_attention_forward
        return operator(q, k, v, None, stops, stops, longest, longest, *flags, scale=K**-0.5)[0]

    try:
        call()
    except RuntimeError as error:
        _say(f"cuDNN's ragged call refuses: {str(error).splitlines()[0]}")
        return
    _say(f"full, unequal, cuDNN's ragged call: forward {1e3 * _milliseconds(call, device, rounds):.0f} us")


def _peer(device: torch.device, rounds: int) -> None:
    """flex_attention with a window; the sink scales its output by a sigmoid of the log-sum-exp."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    for tokens in TOKENS:
        leaves = [None if x is None else x.requires_grad_() for x in _inputs(SLIDING, tokens, device)]
        mask = create_block_mask(
            lambda b, h, query, key: (key <= query) & (key > query - WINDOW), None, None, tokens, tokens, device=device
        )

        def call() -> torch.Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in leaves[:3] if x is not None)
            out, aux = compiled(
                q, k, v, block_mask=mask, enable_gqa=True, scale=K**-0.5, return_aux=AuxRequest(lse=True)
            )
            return out * torch.sigmoid(aux.lse - leaves[3][:, None])[..., None].to(out.dtype)

        forward, backward = _pass_times(call, leaves, rounds)
        _say(f"sliding, {tokens} tokens, flex_attention: forward {1e3 * forward:.0f} us, backward {1e3 * backward:.0f}")


if __name__ == "__main__":
    main()
