"""Packed weights: loss of a converted model by bits, and speed of their products on the CPU against bfloat16 and int8.

    python -m benchmarks.bench_packed loss [--model FOLDER] [--text-rows 128]
    python -m benchmarks.bench_packed speed [--rounds 40]
    LLAMA_CPP_LIBRARIES=FOLDER python -m benchmarks.bench_packed peer [--rounds 40]

`peer` compares products with those of llama.cpp (see `peers.ggml_products`).

The loss is that of held-out answers of the built-in model's tasks. int4 has one float scale (counted as 16 bits) for 32
or 128 weights of a row.

Prediction before the first run of `speed`: at batch 1 the sums take six vector instructions for 64 codes, so they are
limited by instructions and not by reading 2 bits a code, and are 2 to 4 times as fast as bfloat16.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.harness import Row, print_rows, write_rows
from benchmarks.peers.ggml_products import LIBRARIES, ggml_of_environment
from openmimo.data.loader import Batch, Loader
from openmimo.data.tokenizer import Tokenizer
from openmimo.kernels.operations import linear
from openmimo.kernels.weights import Packed, Packing, Weight, pack, quantize
from openmimo.model.embedded import EMBEDDED
from openmimo.model.hf import load_model
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import QuantizableModule, quantize_model
from openmimo.train.loss import evaluate
from recipes import tiny_cpu

CPU = torch.device("cpu")
_GROUPS = (32, 128)
_ROWS = 8  # of a batch
_LEAST = "Times are the least of all rounds, because other programs used the processor."
_CACHE_BYTES = 2**26
_SHAPES = {"2048 x 2048": (2048, 2048), "10920 x 2048": (10920, 2048), "4096 x 4096": (4096, 4096)}
_FORMATS = [
    Packing("binary"), Packing("ternary"), Packing("fairy"), Packing("fairy2i"), Packing("fairy2i", 2),
    Packing("binary", 2),
]  # fmt: skip
_PEER_FORMATS = [
    Packing("binary"), Packing("ternary"), Packing("fairy"), Packing("fairy2i"), Packing("fairy2i", 2),
    Packing("fairy2i", 4),
]  # fmt: skip


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "speed", "peer"])
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--text-rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    if options.what == "loss":
        measure_loss(options.model, options.text_rows)
    elif options.what == "speed":
        rows = measure_speed(options.rounds)
        print_rows(rows)
        write_rows("bench_packed", rows, device=CPU, threads=torch.get_num_threads(), remarks=(_LEAST,))
    else:
        rows, remark = measure_against_llama_cpp(options.rounds)
        print_rows(rows)
        write_rows("bench_packed_peer", rows, device=CPU, threads=1, remarks=(_LEAST, remark))


# --- loss by bits ----------------------------------------------------------------------------------------------------


def measure_loss(folder: str, rows: int) -> None:
    """Prints bits per weight, loss in nats per token, and its rise, for each format."""
    batches = _batches(folder, rows)
    base = _losses(load_model(folder), batches)
    print(f"{'plain':<22}{16:>8} bits  loss {_with_error(base)} nats a token, {rows} rows", flush=True)
    for name, bits, change in _conversions():
        changed = load_model(folder)
        change(changed)
        rise = _losses(changed, batches) - base
        print(f"{name:<22}{bits(changed):>8.3f} bits  loss rises by {_with_error(rise)}", flush=True)


def _conversions() -> Iterator[tuple[str, Callable[[MiMo], float], Callable[[MiMo], None]]]:
    """Yields names, functions that count the bits of a weight, and functions that convert a model in place."""
    for name, most in (("fairy2i", 4), ("binary", 4), ("ternary", 2)):
        for stages in range(1, most + 1):
            for per_row in (False, True):
                packing = Packing(name, stages, per_row)
                label = f"{name} T={stages}{' row' if per_row else ''}"
                yield label, _packed_bits, lambda model, packing=packing: quantize_model(model, packing)
    for stages in (2, 4):
        packing = Packing("fairy2i", stages)
        yield f"fairy2i T={stages} float x", lambda model: math.nan, lambda m, p=packing: _round(m, _values(p))
    for group in _GROUPS:
        yield f"int4 group {group}", lambda model, group=group: 4 + 16 / group, lambda m, g=group: _round(m, _int4(g))
    yield "int8", lambda model: 8.0, lambda model: quantize_model(model, "int8")


def _packed_bits(model: MiMo) -> float:
    weights = [module.held_weight(name) for module, name, _ in _matrices(model)]
    return 8 * sum(weight.nbytes for weight in weights) / sum(weight.shape.numel() for weight in weights)


def _matrices(model: MiMo) -> Iterator[tuple[QuantizableModule, str, int]]:
    for module in model.modules():
        if isinstance(module, QuantizableModule):
            for name, matrices in module.quantizable.items():
                yield module, name, matrices


@torch.no_grad()
def _round(model: MiMo, rounded: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    for module, name, matrices in _matrices(model):
        weight = getattr(module, name)
        weight.copy_(rounded(weight, matrices))


def _values(packing: Packing) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda weight, matrices: pack(weight, packing, matrices).dequantize(torch.float32)


def _int4(group: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    def rounded(weight: torch.Tensor, matrices: int) -> torch.Tensor:
        groups = weight.split(group, dim=-1)
        scales = [part.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7 for part in groups]
        return torch.cat([(part / scale).round() * scale for part, scale in zip(groups, scales, strict=True)], -1)

    return rounded


def _batches(folder: str, rows: int) -> list[Batch]:
    """Returns held-out demonstrations of the tasks for which the built-in model was trained; only answers count."""
    sft = tiny_cpu.sft()
    loader = Loader(sft.mixture, Tokenizer.load(Path(folder)), sequence_length=sft.sequence_length, seed=0, stage=0)
    return list(loader.fixed_batches(_ROWS, rows // _ROWS))


@torch.inference_mode()
def _losses(model: MiMo, batches: list[Batch]) -> torch.Tensor:
    """Returns the mean loss of the main head on each batch, in nats a token."""
    return torch.tensor([evaluate(model, [batch], tiny_cpu.sft().sequence_length).losses[0] for batch in batches])


def _with_error(values: torch.Tensor) -> str:
    """Returns the mean and its standard error as text."""
    return f"{values.mean():.4f} +- {values.std() / len(values) ** 0.5:.4f}"


# --- speed -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_speed(rounds: int) -> list[Row]:
    """Compares products with packed weights with those of bfloat16 and int8 weights of the same matrix.

    Each call reads another of several copies of the weights, which together exceed the caches. The floor of a product
    is its bytes by the rate at which that with bfloat16 weights reads at batch 1.
    """
    rows = []
    for name, (outputs, dims) in _SHAPES.items():
        plain = torch.randn(outputs, dims, generator=torch.Generator().manual_seed(0))
        weights = [plain.bfloat16(), quantize(plain, "int8"), *(pack(plain, packing) for packing in _FORMATS)]
        copies = [[_copy(weight) for _ in range(2 + _CACHE_BYTES // weight.nbytes)] for weight in weights]
        rate = 0.0
        for batch in (1, 4, 16):
            x = torch.randn(batch, dims, generator=torch.Generator().manual_seed(1))
            calls = [_calls(x.bfloat16() if number == 0 else x, copies[number]) for number in range(len(weights))]
            times = _least_milliseconds(calls, rounds=rounds)
            rate = rate or weights[0].nbytes / times[0]
            for weight, milliseconds in zip(weights[1:], times[1:], strict=True):
                label = "int8" if weight.format == "int8" else f"{weight.format} T={weight.packing.stages}"
                note = f"{weight.nbytes / milliseconds / 1e6:.1f} GB/s"
                floor = weight.nbytes / rate
                rows.append(Row(f"{name} batch {batch} {label}", milliseconds, times[0], "bfloat16", floor, note=note))
    return rows


@torch.inference_mode()
def measure_against_llama_cpp(rounds: int) -> tuple[list[Row], str]:
    """Compares products of one thread with those of llama.cpp: formats of 2 bits with TQ2_0, the others with Q4_0.

    Returns:
        The rows, without a peer when the environment names no libraries, and a sentence about the peer.
    """
    torch.set_num_threads(1)
    ggml = ggml_of_environment()
    rows = []
    for name, (outputs, dims) in _SHAPES.items():
        plain = torch.randn(outputs, dims, generator=torch.Generator().manual_seed(0))
        two_values = -(plain > 0).float()
        weights = [plain.bfloat16(), quantize(plain, "int8"), *(pack(plain, packing) for packing in _PEER_FORMATS)]
        copies = [[_copy(weight) for _ in range(2 + _CACHE_BYTES // weight.nbytes)] for weight in weights]
        for batch in (1, 4):
            x = torch.randn(batch, dims, generator=torch.Generator().manual_seed(1))
            calls = [_calls(x.bfloat16() if number == 0 else x, copies[number]) for number in range(len(weights))]
            theirs = {}
            if ggml:
                for kind, code_bits in (("TQ2_0", 2), ("Q4_0", 4)):
                    count = 2 + 8 * _CACHE_BYTES // (code_bits * plain.numel())
                    theirs[kind] = ggml.products(two_values, x, kind, copies=count, threads=1)
            times = _least_milliseconds([*calls, *(product.call for product in theirs.values())], rounds=rounds)
            per_product = [
                time / product.count for time, product in zip(times[len(calls) :], theirs.values(), strict=True)
            ]
            peer_times = dict(zip(theirs, per_product, strict=True))
            for product in theirs.values():
                product.free()
            for weight, milliseconds in zip(weights, times, strict=False):
                label, kind = _label_and_peer(weight)
                peer = f"llama.cpp {kind}" if ggml else f"llama.cpp {kind}: not measured"
                note = f"{weight.nbytes / milliseconds / 1e6:.1f} GB/s"
                title = f"{name} batch {batch}, {label}"
                rows.append(Row(title, milliseconds, peer_times.get(kind), peer, note=note))
    if ggml is None:
        return rows, f"llama.cpp: not measured, because {LIBRARIES} is not set."
    return rows, f"llama.cpp: ggml {ggml.version}, {ggml.variant}; Q4_0 without the layout of loaded models."


def _label_and_peer(weight: torch.Tensor | Weight) -> tuple[str, str]:
    """Returns the name of a weight's format, and the format of llama.cpp with which it is compared."""
    if isinstance(weight, torch.Tensor):
        return "bfloat16", "Q4_0"
    if not isinstance(weight, Packed):
        return weight.format, "Q4_0"
    return f"{weight.format} T={weight.packing.stages}", "Q4_0" if weight.packing.stages == 4 else "TQ2_0"


def _copy(weight):
    if isinstance(weight, torch.Tensor):
        return weight.clone()
    return weight._replace(codes=weight.codes.clone(), scales=weight.scales.clone())


def _calls(x: torch.Tensor, weights: list) -> Callable[[], object]:
    """Returns a function that multiplies x with the next of the weights."""
    turn = iter(range(1 << 60))
    return lambda: linear(x, weights[next(turn) % len(weights)])


def _least_milliseconds(calls: list[Callable[[], object]], *, rounds: int) -> list[float]:
    """Returns the least wall time of each call, in which the scheduler has not interrupted it. Rounds run all calls."""
    least = [math.inf] * len(calls)
    for _ in range(rounds):
        for number, call in enumerate(calls):
            started = time.perf_counter()
            call()
            least[number] = min(least[number], time.perf_counter() - started)
    return [1e3 * seconds for seconds in least]


if __name__ == "__main__":
    main()
