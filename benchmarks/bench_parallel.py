"""Training and decoding on two cards of one host, against one card of the same run.

    python -m benchmarks.bench_parallel [--rows fsdp ep cp pp interleaved longest tp] [--seconds 60]
    python -m benchmarks.bench_parallel --dry

Rows of training are whole optimizer steps in bfloat16:

- fsdp: `medium`, 4 rows of 4,096 tokens a card. Goal: 0.90 of twice the tokens/s of one card.
- ep: the same with the experts divided. Goal: 0.85.
- cp: `medium` with its MTP head, 131,072 tokens in packs of unequal documents, recomputed. Goal: 0.58 of the step.
- pp, interleaved: `medium` in pipeline stages, 8 micro-batches of a row.
- longest: tokens of the longest pack, by steps of a quarter, until memory ends.
- tp: decoding of 32 sequences with six layers of `flash` (64 of its experts) through `LLM(tp=2)`. Goal: 1.6 times.

The note of a row has the exposed communication of a profiled step (the share in which a collective runs and no other
kernel), and the plan's bytes and time. The plan takes the efficiency of the products from the step of one card.

Every measurement has processes of its own, with a limit of time. One that fails is a remark, and the next one runs.
Results are written after each row. This benchmark has not yet run on a GPU; figures of --dry say nothing of one.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, print_rows, write_rows
from openmimo.core.records import SamplingParams
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.config import ModelConfig, training_flops_per_token
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.heads import MicroBatch, micro_batch
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import flash, medium, tiny
from openmimo.parallel.plan import CARDS, MeshSizes, StepShape, plan
from openmimo.runtime.device import device_count, device_name, resolve_device, synchronize
from openmimo.train.config import OptimizerConfig
from openmimo.train.loss import loss_of_states
from openmimo.train.optim import build_optimizer, clip_gradients
from openmimo.train.trainer import Alone

GIB = 2**30
SHARES = (0.31, 0.02, 0.17, 0.05, 0.22, 0.01, 0.13)  # of the documents of a pack; the last has the rest
TRAINING = ("fsdp", "ep", "cp", "pp", "interleaved")
ROWS = (*TRAINING, "longest", "tp")
Span = tuple[float, float]


@dataclass(frozen=True)
class Case:
    """A training step.

    Attributes:
        sizes: The mesh on two cards.
        goal: Least speed against one card (None: no goal).
        rows: Rows of the step on one card.
        grows: Whether the step has twice as many rows on two cards.
        micro_batch_rows: Rows of a micro-batch of one process.
        length: Tokens of a row.
        is_pack: Whether a row has several documents.
        recompute: Whether layers are recomputed.
    """

    sizes: MeshSizes
    goal: float | None
    rows: int
    grows: bool
    micro_batch_rows: int
    length: int
    is_pack: bool = False
    recompute: bool = False

    def rows_on(self, cards: int) -> int:
        """Rows of the step."""
        return self.rows * cards if self.grows else self.rows

    def documents(self) -> tuple[int, ...]:
        """Lengths of the documents of a micro-batch."""
        if not self.is_pack:
            return (self.length,) * self.micro_batch_rows
        lengths = tuple(max(int(self.length * share), 1) for share in SHARES)
        return (*lengths, self.length - sum(lengths))


def case_of(name: str, *, is_dry: bool) -> Case:
    """The case of a row."""
    length, long = (48, 128) if is_dry else (4096, 131_072)
    pipeline = Case(MeshSizes(pp=2), None, 8, False, 1, length)
    cases = {
        "fsdp": Case(MeshSizes(dp_shard=2), 2 * 0.90, 4, True, 4, length),
        "ep": Case(MeshSizes(dp_shard=2, ep=2), 2 * 0.85, 4, True, 4, length),
        "cp": Case(MeshSizes(cp=2), 1 / 0.58, 1, False, 1, long, is_pack=True, recompute=True),
        "pp": pipeline,
        "interleaved": replace(pipeline, sizes=MeshSizes(pp=2, stages_per_rank=2)),
    }
    cases["longest"] = cases["cp"]
    return cases[name]


def model_of(*, is_dry: bool) -> ModelConfig:
    """The model of training rows."""
    return tiny() if is_dry else medium()


# --- one process of a measurement ------------------------------------------------------------------------------------


@contextmanager
def _ranks(case: Case, cards: int, device: torch.device) -> Iterator[Alone]:
    """This process alone, or one of two."""
    if cards == 1:
        yield Alone(device)
        return
    from openmimo.parallel.ranks import open_ranks

    sizes = {name: getattr(case.sizes, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
    schedule = "1f1b" if case.sizes.stages_per_rank == 1 else "interleaved"
    options = {
        "schedule": schedule, "stages": case.sizes.num_stages, "boundaries": (), "sequence_length": case.length,
    }  # fmt: skip
    with open_ranks(device, sizes, options if case.sizes.pp > 1 else None) as ranks:
        yield ranks  # type: ignore[misc]  # it has the methods of `Alone` that this file calls


def _model(ranks: Alone, config: ModelConfig, case: Case, *, is_dry: bool) -> tuple[MiMo, torch.optim.Optimizer]:
    """A distributed model and its optimizer."""
    with torch.device(ranks.device):
        model = MiMo(config)
    model.initialize(torch.Generator(ranks.device).manual_seed(0))
    if not is_dry:
        model.compute_dtype = torch.bfloat16
    if case.recompute:
        checkpoint_activations(model.model)
    ranks.apply(model.train())
    optimizer = build_optimizer(model, OptimizerConfig(), mesh_of=ranks.mesh_of)
    return model, optimizer


def _step(ranks: Alone, model: MiMo, optimizer: torch.optim.Optimizer, case: Case, cards: int) -> Callable[[], None]:
    """A function that runs one optimizer step on random tokens."""
    config, documents = model.config, case.documents()
    generator = torch.Generator().manual_seed(ranks.row_rank)
    count = case.rows_on(cards) // ranks.num_row_ranks // case.micro_batch_rows
    batches = [
        micro_batch(
            torch.randint(0, config.vocab_size, (sum(documents),), generator=generator),
            documents,
            None,
            config.num_mtp_heads,
        ).to(ranks.device)
        for _ in range(count)
    ]
    labels = torch.stack([batch.label_counts() for batch in batches]).sum(0).to(ranks.device)
    labels = ranks.sum_over_rows(labels)

    def split(batch: MicroBatch) -> tuple[MicroBatch, PackedContext]:
        tape = RoutingTape(record=True)
        return ranks.split(batch, routing=tape, balance_weight=1e-5, balance_length=case.length)

    def run() -> None:
        ranks.backward(
            model,
            batches,
            split=split,
            loss=lambda states, part: loss_of_states(model, states, part, label_counts=labels, mtp_weight=0.3),
            seen=lambda context: None,
        )
        clip_gradients(model, 1.0, gradients=ranks.gradients)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def measure_training(name: str, cards: int, path: Path, *, is_dry: bool) -> None:
    """Measure steps of a row in this process, and write figures to `path` if it is the main one."""
    case = case_of(name, is_dry=is_dry)
    with _ranks(case, cards, resolve_device("auto")) as ranks:
        model, optimizer = _model(ranks, model_of(is_dry=is_dry), case, is_dry=is_dry)
        if name == "longest":
            _measure_longest(ranks, model, optimizer, case, cards, path, is_dry=is_dry)
            return
        run = _step(ranks, model, optimizer, case, cards)
        times = [_seconds(run, ranks.device) for _ in range(3 if is_dry else 8)][2:]
        figures = {"seconds": statistics.median(times), "bytes": _peak_bytes(ranks.device)}
        _write(ranks, path, figures)
        if cards > 1:
            _write(ranks, path, figures | {"exposed": _profiled(run, ranks.device)})


def _measure_longest(
    ranks: Alone, model: MiMo, optimizer: torch.optim.Optimizer, case: Case, cards: int, path: Path, *, is_dry: bool
) -> None:
    """Write the tokens of each pack on which a step ends."""
    for number in range(2 if is_dry else 40):
        tokens = int(case.length * 1.25**number) // 16 * 16
        longer = replace(case, length=tokens)
        seconds = _seconds(_step(ranks, model, optimizer, longer, cards), ranks.device)
        _write(ranks, path, {"tokens": tokens, "seconds": seconds})


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _peak_bytes(device: torch.device) -> float:
    return 0.0 if device.type == "cpu" else float(torch.cuda.max_memory_allocated(device))


def _profiled(run: Callable[[], None], device: torch.device) -> float:
    """Share of a step in which only collectives run."""
    from torch.profiler import ProfilerActivity, profile

    on_cpu = device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as found:
        run()
        synchronize(device)
    sent: list[Span] = []
    computed: list[Span] = []
    for event in found.events() or ():
        if not on_cpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue
        span = (float(event.time_range.start), float(event.time_range.end))
        (sent if event.name.startswith(("nccl", "gloo:")) else computed).append(span)
    every = sent + computed
    return exposed(sent, computed) / max(max(stop for _, stop in every) - min(start for start, _ in every), 1e-9)


def exposed(sent: Sequence[Span], computed: Sequence[Span]) -> float:
    """Time in which a collective runs and nothing else does."""
    return _length([*sent, *computed]) - _length(computed)


def _length(spans: Sequence[Span]) -> float:
    """Length of a union of spans."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(stop - max(start, reached), 0.0)
        reached = max(reached, stop)
    return total


def _write(ranks: Alone, path: Path, figures: dict[str, float]) -> None:
    if ranks.is_main:
        path.write_text(json.dumps(figures))


def decode_config(*, is_dry: bool) -> ModelConfig:
    """The model of the row tp."""
    if is_dry:
        return replace(tiny(), mtp=None)
    whole = flash()
    assert whole.moe is not None
    moe = replace(whole.moe, num_experts=64)
    return replace(whole, layers=whole.layers[:6], moe=moe, mtp=None, vocab_size=32_000)


def save_slice(folder: Path, *, is_dry: bool) -> None:
    """Write a checkpoint with random weights."""
    device = resolve_device("auto")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if is_dry else torch.bfloat16)
    try:
        with torch.device(device):
            model = MiMo(decode_config(is_dry=is_dry))
    finally:
        torch.set_default_dtype(previous)
    model.initialize(torch.Generator(device).manual_seed(0))
    save_model(model, folder)


def measure_decoding(folder: Path, cards: int, path: Path, *, is_dry: bool) -> None:
    """Measure a decoding step through `LLM`: the difference of a long and of a short call."""
    from openmimo import LLM

    batch, prompt, few, many = (2, 8, 2, 6) if is_dry else (32, 512, 8, 136)
    llm = LLM(str(folder), dtype="float32" if is_dry else "bfloat16", tp=cards, speculative=False)
    device = llm.model.device
    generator = torch.Generator().manual_seed(0)

    def seconds(new: int) -> float:
        prompts = torch.randint(0, llm.model.config.vocab_size, (batch, prompt), generator=generator).tolist()
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, seed=0)
        return _seconds(lambda: _checked(llm.generate(prompts, params), new), device)

    try:
        seconds(few)
        times = [(seconds(many) - seconds(few)) / (many - few) for _ in range(1 if is_dry else 3)]
        path.write_text(json.dumps({"seconds": max(statistics.median(times), 1e-9), "sequences": batch}))
    finally:
        llm.close()


def _checked(completions: list[Any], new: int) -> None:
    """Raise RuntimeError if a sequence has failed."""
    if any(len(completion.token_ids) != new for completion in completions):
        raise RuntimeError(f"a sequence has not {new} tokens: {completions[0].error}")


# --- the processes of a measurement ----------------------------------------------------------------------------------


def launch(name: str, cards: int, options: argparse.Namespace, folder: Path) -> tuple[dict[str, float], str]:
    """Run a measurement in processes of its own. Returns its figures, and the error if it failed."""
    path, logs = folder / f"{name}-{cards}.json", []
    count = 1 if name in ("tp", "slice") else cards
    command = [sys.executable, "-m", "benchmarks.bench_parallel", "--worker", name, "--cards", str(cards)]
    command += ["--folder", str(folder)] + (["--dry"] if options.dry else [])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        logs.append(folder / f"{name}-{cards}-{rank}.log")
        with logs[-1].open("w") as log:
            environment = os.environ | {key: str(value) for key, value in own.items()}
            processes.append(subprocess.Popen(command, env=environment, stderr=log, stdout=log, start_new_session=True))
    failure = _wait(processes, options.seconds)
    figures = json.loads(path.read_text()) if path.is_file() else {}
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    return figures, f"{failure}: {lines[-1][:300] if lines else 'no message'}" if failure else ""


def _wait(processes: list["subprocess.Popen[bytes]"], seconds: float) -> str:
    """Wait for processes, and end all if one fails or the time is over. Returns the reason."""
    deadline, failure = time.monotonic() + seconds, ""
    while not failure and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            failure = "a process failed"
        elif time.monotonic() > deadline:
            failure = f"longer than its limit ({seconds:.0f} s)"
        else:
            time.sleep(0.05)
    if any(process.poll() for process in processes):
        failure = failure or "a process failed"
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # each leads a group of its own, which has the ranks of an engine
        process.wait()
    return failure


def measure(name: str, options: argparse.Namespace, folder: Path) -> tuple[Row | None, list[str]]:
    """Measure one row. Returns it, and the errors of its measurements."""
    remarks = []
    figures = []
    if name == "tp":
        _, error = launch("slice", 1, options, folder)
        remarks += [f"tp: its checkpoint failed: {error}"] if error else []
    for cards in (1, 2):
        found, error = launch(name, cards, options, folder)
        figures.append(found)
        if error:
            remarks.append(f"{name} on {cards}: {error}")
    one, two = figures
    if "seconds" not in two:
        return None, remarks
    alone = 1e3 * one["seconds"] if "seconds" in one else None
    if name == "longest":
        note = f"{two['tokens']:,} tokens on two, {one.get('tokens', 0):,} on one; the times are those of these lengths"
        return Row("longest pack", 1e3 * two["seconds"], alone, "one card, its longest", note=note), remarks
    if name == "tp":
        note = f"{two['sequences'] / two['seconds']:,.0f} tokens/s"
        return Row("decoding step, tp 2", 1e3 * two["seconds"], alone, "one card", goal=1.6, note=note), remarks
    return _training_row(name, one, two, is_dry=options.dry), remarks


def _training_row(name: str, one: dict[str, float], two: dict[str, float], *, is_dry: bool) -> Row:
    """The row of a training step. The time of one card is that of the work of two."""
    case = case_of(name, is_dry=is_dry)
    tokens = case.rows_on(2) * case.length
    note = f"{tokens / two['seconds']:,.0f} tokens/s"
    note += f", {two['exposed']:.1%} exposed communication" if "exposed" in two else ""
    if "seconds" not in one:
        return Row(name, 1e3 * two["seconds"], goal=case.goal, note=note)
    scale = case.rows_on(2) / case.rows_on(1)
    note += f", one card {case.rows_on(1) * case.length / one['seconds']:,.0f}" + _predicted(case, one, two, is_dry)
    return Row(name, 1e3 * two["seconds"], 1e3 * scale * one["seconds"], "one card", goal=case.goal, note=note)


def _predicted(case: Case, one: dict[str, float], two: dict[str, float], is_dry: bool) -> str:
    """The plan's bytes and time, next to those measured."""
    config, card = model_of(is_dry=is_dry), CARDS["h200" if "H200" in device_name(resolve_device("auto")) else "h100"]
    work = training_flops_per_token(config, case.length) * case.rows_on(1) * case.length
    work *= 4 / 3 if case.recompute else 1
    efficiency = work / one["seconds"] / card.flops
    step = StepShape(case.length, case.rows_on(2), case.micro_batch_rows, 4 if is_dry else 2, case.recompute)
    found = plan(config, case.sizes, step, card, efficiency=efficiency)
    received = sum(vars(found.traffic).values())
    return (
        f"; plan: {1e3 * found.step_seconds:.1f} ms, {found.memory_by_rank[0] / GIB:.2f} GiB (measured "
        f"{two['bytes'] / GIB:.2f}), {received / GIB:.2f} GiB received, efficiency of one card {efficiency:.2%}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure the rows, and write the results unless --dry. Returns the number of failures."""
    parser = argparse.ArgumentParser(prog="bench_parallel", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what is measured (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="limit of a measurement (default: 60)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="toy sizes on two processes of the CPU; writes nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cards", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _work(options)
        return 0
    device = resolve_device("auto")
    if not options.dry and (device.type == "cpu" or device_count() < 2):
        parser.error("this benchmark needs two accelerators; --dry runs it at toy sizes on the CPU")
    rows: list[Row] = []
    remarks: list[str] = []
    for name in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            row, errors = measure(name, options, Path(folder))
        rows += [row] if row else []
        remarks += errors
        print(f"[{time.strftime('%H:%M:%S')}] {name}: {row or 'no figure'}; {'; '.join(errors)}", flush=True)
        if not options.dry:
            write_rows("bench_parallel", rows, device=device, threads=1, remarks=tuple(remarks), folder=options.out)
    print_rows(rows)
    return sum(not remark.startswith("longest") for remark in remarks)  # it ends when memory does


def _work(options: argparse.Namespace) -> None:
    """Be one process of a measurement."""
    if options.dry:
        torch.set_num_threads(1)
    folder, path = options.folder, options.folder / f"{options.worker}-{options.cards}.json"
    if options.worker == "slice":
        save_slice(folder / "slice", is_dry=options.dry)
    elif options.worker == "tp":
        measure_decoding(folder / "slice", options.cards, path, is_dry=options.dry)
    else:
        measure_training(options.worker, options.cards, path, is_dry=options.dry)


if __name__ == "__main__":
    sys.exit(main())
