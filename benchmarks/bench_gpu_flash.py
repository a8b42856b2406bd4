"""Layers 0 to 6 of the preset `flash` on a GPU, at full size: a step of the engine against the bytes that it must read.

    python -m benchmarks.bench_gpu_flash [--batches 1 8 32 128] [--contexts 4096 32768] [--caches fp8 bfloat16]

The weights are random FP8 codes with scales for each block of 128 x 128, made on the device; routers, norms and output
projections are plain, as in the published checkpoint. So the text is noise, and nearly uniform routes reach about as
many experts as a batch can. Times do not depend on the values.

Layer 0 is full with a dense FFN, layers 1 to 4 and 6 are sliding with experts, layer 5 is full with experts. A row is
one layer of a kind in a captured graph, with the engine's attention context over its pages: decoding has one token for
each sequence, verification four. Rows of a step are the whole captured pass of the engine's worker over the seven
layers with embedding and output head.

The floor counts the weights as they are stored, of the experts only those that the tokens of the call chose, and the
cached keys and values in reach, at the measured rate of a copy. The goal is 1.4 times the floor.

`--warm` only compiles the kernels of the grid, for parallel processes before a measurement.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from benchmarks.bench_gpu_kernels import copy_bytes_per_ms
from benchmarks.harness import Row, median_milliseconds, print_rows, write_rows
from openmimo.engine.cache import PageArena, PageTables, plan_pages
from openmimo.engine.step import PassInput, Span, StepBuffers, padded_shape
from openmimo.engine.worker import PagedContext, RotaryRows, Worker, why_no_graphs
from openmimo.kernels.weights import BlockScaled
from openmimo.model.config import ModelConfig
from openmimo.model.mimo import MiMo
from openmimo.model.presets import flash
from openmimo.model.weight_formats import QuantizableModule, allocate_quantized
from openmimo.runtime.device import CapturedGraphs, resolve_device

NUM_LAYERS = 7
KINDS = {0: "full, dense", 1: "sliding, experts", 5: "full, experts"}
QUERIES = (1, 4)
GOAL = 1.4
CACHE_DTYPES = {"fp8": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}
_ROUNDS, _BUSY_MS = 7, 8.0
_MAX_QUERIES = 16
_WARM_VOCABULARY = 512
_BELOW_TWO, _BELOW_ONE = 0xBFBFBFBF - (1 << 32), 0xB7B7B7B7 - (1 << 32)  # masks for four float8 numbers


def main(arguments: list[str] | None = None) -> None:
    """Measures the layers and steps, prints a table, and writes the results unless --no-write."""
    parser = argparse.ArgumentParser(prog="bench_gpu_flash", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="sequences")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32_768], help="cached positions of each")
    parser.add_argument("--caches", nargs="+", default=["fp8", "bfloat16"], choices=CACHE_DTYPES, help="cache formats")
    parser.add_argument("--warm", action="store_true", help="only compile the kernels")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    device = resolve_device("auto")
    if device.type == "cpu":
        parser.error("this benchmark needs an accelerator")
    model = random_model(flash_layers(), device, shares_experts=options.warm)
    print(
        f"[{time.strftime('%H:%M:%S')}] {sum(t.nbytes for t in model.state_dict().values()) / 1e9:.1f} GB", flush=True
    )
    rows: list[Row] = []
    with torch.inference_mode():
        rate = 0.0 if options.warm else copy_bytes_per_ms(device)
        for name in options.caches:
            bench = Bench(model, CACHE_DTYPES[name], max(options.batches), max(options.contexts), rate)
            for context in options.contexts:
                for batch in options.batches:
                    for queries in QUERIES:
                        where = f"{name} cache, batch {batch}, context {context}, {queries} queries"
                        rows += bench.measure(where, batch, queries, context, only_compile=options.warm)
                    print(f"[{time.strftime('%H:%M:%S')}] {name} {context} {batch}", flush=True)
            del bench
            torch.cuda.empty_cache()
    if options.warm:
        return
    print_rows(rows)
    if not options.no_write:
        remarks = (
            f"A copy moves {rate * 1e-9:.2f} TB/s, bytes read plus bytes written.",
            "Random weights: layers 0 to 6 of the preset `flash` in FP8.",
        )
        print(f"wrote {write_rows('bench_gpu_flash', rows, device=device, threads=1, remarks=remarks)}")


def flash_layers() -> ModelConfig:
    """The first layers of `flash`, without MTP heads."""
    config = flash()
    return replace(config, layers=config.layers[:NUM_LAYERS], mtp=None)


def random_model(config: ModelConfig, device: torch.device, *, shares_experts: bool = False) -> MiMo:
    """A model with random FP8 weights, which are made on the device.

    Args:
        config: Its geometry.
        device: The device.
        shares_experts: Whether all layers have the same experts and the vocabulary is small, to save memory.
    """
    if shares_experts:
        config = replace(config, vocab_size=_WARM_VOCABULARY)
    with torch.device("meta"):
        model = MiMo(config).to(torch.bfloat16)
        for router in model.routers().values():
            router.float()
        allocate_quantized(model, "fp8", config.qkv_ranks)
        if shares_experts:
            for index in model.routers():
                model.model.layers[index].mlp = model.model.layers[1].mlp
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for module in model.modules():
            _fill(module)
    return model


def _fill(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        held = module.held_weight(name) if isinstance(module, QuantizableModule) else parameter
        if isinstance(held, BlockScaled):
            _random_bits(held.codes, _BELOW_TWO)
            held.scales.uniform_(0.005, 0.015)
        elif parameter.dim() == 1:
            parameter.fill_(0.0 if "sink" in name else 1.0)
        else:
            parameter.normal_(std=0.02)
    for name, buffer in module.named_buffers(recurse=False):
        if name == "e_score_correction_bias":
            buffer.zero_()


def _random_bits(numbers: torch.Tensor, mask: int) -> None:
    """Fill float8 numbers, of which a row has a multiple of four. Their mean is 0, so that tokens stay different."""
    numbers.view(torch.int32).random_(-(1 << 31), (1 << 31) - 1).bitwise_and_(mask)


class Bench:
    """A model with a cache of random numbers for the largest call.

    Args:
        model: The model.
        cache_dtype: Of the cache.
        max_sequences: Sequences of the largest call.
        max_context: Positions of the longest sequence.
        rate: Bytes of a copy in a millisecond.
    """

    def __init__(self, model: MiMo, cache_dtype: torch.dtype, max_sequences: int, max_context: int, rate: float):
        self._model, self._rate, self._max_sequences = model, rate, max_sequences
        layers, device = model.config.attention_layers(), model.device
        layout = plan_pages(layers, 32, dtype=cache_dtype)
        pages = 0
        for group in layout.groups:
            kept = group.spec.keep_positions
            pages += group.pages_until(max_context if kept is None else kept + _MAX_QUERIES + 2 * group.page_positions)
        num_bytes = max_sequences * pages * layout.page_numbers * cache_dtype.itemsize
        self._arena = PageArena(layers, cache_bytes=num_bytes, dtype=cache_dtype, device=device, page_positions=32)
        for layer in range(len(layers)):
            for tensor in self._arena.layer(layer):
                if cache_dtype == torch.bfloat16:
                    tensor.normal_()
                else:
                    _random_bits(tensor, _BELOW_ONE)
        assert why_no_graphs(model, cache_dtype) is None, why_no_graphs(model, cache_dtype)
        self._worker = Worker(model, self._arena, num_drafts=0, uses_graphs=True, max_decided=1)
        self._buffers = StepBuffers(
            self._arena, device, range(len(layers)), max_tokens=_MAX_QUERIES * max_sequences,
            max_sequences=max_sequences, max_positions=model.config.max_positions,
        )  # fmt: skip
        self._context = PagedContext(self._arena, RotaryRows(device, model.config.max_positions))

    def measure(self, where: str, batch: int, queries: int, context: int, *, only_compile: bool) -> list[Row]:
        """A row for each kind of layer, and one for the step."""
        tables = [PageTables(self._arena, queries) for _ in range(batch)]
        for table in tables:
            table.reach(context)
        spans = [Span(table, context - queries, context) for table in tables]
        shape = padded_shape(
            batch, queries, context, max_sequences=self._max_sequences, max_positions=self._model.config.max_positions
        )
        assert shape is not None, "the pass is too large for a graph"
        token_ids = torch.randint(0, self._model.config.vocab_size, (batch * queries,)).tolist()
        step = self._buffers.fill(spans, token_ids, shape)
        self._buffers.send()
        rows = []
        for index, kind in KINDS.items():
            layer = self._model.model.layers[index]
            x_TD = torch.randn(batch * queries, self._model.config.hidden_size, device=self._model.device).bfloat16()
            num_hit = self._experts_hit(step, index, x_TD)
            if only_compile:
                continue
            floor = self._layer_bytes(index, num_hit, batch, queries, context) / self._rate

            def call(layer: nn.Module = layer, x_TD: torch.Tensor = x_TD) -> torch.Tensor:
                return layer(x_TD, self._context.bind(step))

            ms = self._milliseconds(call, floor)
            note = f"{1e3 * ms:.0f} us, {ms / floor:.2f} x the floor, goal {GOAL} x"
            rows.append(
                Row(f"{kind}, {where}", ms, floor_ms=floor, note=note + (f"; {num_hit} experts" if num_hit else ""))
            )
        if not only_compile:
            rows.append(self._whole_step(where, step, batch, queries, context))
        for table in tables:
            table.release()
        return rows

    def _whole_step(self, where: str, step: PassInput, batch: int, queries: int, context: int) -> Row:
        self._worker._context.bind(step, records_routing=True)
        self._model(step.token_ids_T, self._worker._context)
        recorded = self._worker._context.routing.recorded
        floor_bytes = self._model.head.weight.nbytes + sum(
            self._layer_bytes(index, _distinct(recorded.get(index)), batch, queries, context)
            for index in range(NUM_LAYERS)
        )
        graphs, floor = self._worker.graphs, floor_bytes / self._rate
        assert graphs is not None
        graphs.replay(step)
        ms = _timed(lambda: graphs.replay(step), floor, self._model.device)
        return Row(f"step of {NUM_LAYERS} layers, {where}", ms, floor_ms=floor, note=f"{ms / floor:.2f} x the floor")

    def _experts_hit(self, step: PassInput, index: int, x_TD: torch.Tensor) -> int:
        context = self._context.bind(step, records_routing=True)
        self._model.model.layers[index](x_TD, context)
        return _distinct(context.routing.recorded.get(index))

    def _layer_bytes(self, index: int, num_hit: int, batch: int, queries: int, context: int) -> float:
        config, spec = self._model.config, self._model.config.layers[index].attention
        total = 0.0
        for name, tensor in self._model.model.layers[index].state_dict().items():
            assert config.moe is not None
            total += tensor.nbytes * (num_hit / config.moe.num_experts if ".experts." in name else 1.0)
        reach = context if spec.window_keys is None else min(context, spec.window_keys + queries - 1)
        numbers = spec.num_kv_heads * (spec.key_dim + spec.value_dim)
        return total + batch * reach * numbers * self._arena.dtype.itemsize

    def _milliseconds(self, call: Callable[[], object], floor: float) -> float:
        """Time of one of several calls in a captured graph."""
        calls = 4

        def several() -> None:
            for _ in range(calls):
                call()

        return _timed(CapturedGraphs(self._model.device).capture(several), calls * floor, self._model.device) / calls


def _timed(replay: Callable[[], object], floor: float, device: torch.device) -> float:
    """Milliseconds of a replay, many of which are queued at once."""
    count = max(2, round(_BUSY_MS / floor))

    def replays() -> None:
        for _ in range(count):
            replay()

    (ms,) = median_milliseconds([replays], rounds=_ROUNDS, device=device)
    return ms / count


def _distinct(ids_TA: torch.Tensor | None) -> int:
    return 0 if ids_TA is None else ids_TA.unique().numel()


if __name__ == "__main__":
    main()
