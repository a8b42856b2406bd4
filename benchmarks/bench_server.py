"""A soak test of the server with a real engine: many concurrent clients, valid, invalid and cancelled requests.

    python -m benchmarks.bench_server [--device cpu] [--requests 500] [--clients 64] [--checkpoint PATH] [--threads 1]
        [--max-sequences 64] [--cache-gigabytes N] [--limit-seconds N] [--no-drafts] [--seed 0] [--quick] [--no-write]

`openmimo serve` runs in its own process. Without --checkpoint it serves random weights: on a CPU the `tiny` preset with
32 MiB of cache, else `med` of `engine_models` with 4 GB. The small cache fills early, so prefixes are evicted while
others are read. The queue holds half as many requests as there are clients, so some of the first requests get a 429.
Each client sends its next request when the previous one is answered. Times are measured by the clients, on the machine
of the server, from the first attempt that gets no 429. If a check fails, the exit status is 1, and no results are
written. On an accelerator, a text may depend on its batch.

Predictions before the first run, for `tiny`, 64 clients and two cores: A step of 64 sequences takes 15 ms. The event
loop holds the interpreter for the same time to send 64 events. This gives 40 ms a token at the median and 100 ms at
p95. The first token needs two or three steps: 120 ms, and 1 s at p99, because the first step reads 64 prompts at 256
tokens a step. A request of 60 tokens takes 2.5 s. The total is 1,200 tokens/s, at 0.9 CPU seconds per 1,000 tokens.
Resident memory grows by less than 3 % after the first quarter.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, print_rows, write_rows
from benchmarks.soak.client import Outcome, ask
from benchmarks.soak.http import Connection
from benchmarks.soak.load import Planned, long_stream, plan_load, warm_up
from benchmarks.soak.process import ServerProcess, save_random_med, save_random_tiny
from openmimo.runtime.device import resolve_device

MAX_MEMORY_GROWTH = 0.10
QUICK_REQUESTS = 60
_TINY_CACHE_GIGABYTES, _MED_CACHE_GIGABYTES = 1 / 32, 4.0
_SAMPLE_SECONDS, _SHOW_SECONDS = 0.1, 10.0
_IDLE_SECONDS, _EXIT_SECONDS = 5.0, 15.0
_STREAM_AT_THE_END_TOKENS = 400


@dataclass
class Findings:
    """The measurements of a soak test.

    Attributes:
        planned: The requests to send.
        outcomes: Outcomes of finished requests.
        num_stuck: Clients whose request did not end within the time limit.
        resident_bytes: Pairs of the number of finished requests and the memory of the server at that time.
        device_bytes: Used memory of the accelerator before and after the load.
        seconds: Wall time of the load.
        cpu_seconds: CPU time of the server during the load.
        core_wait_seconds: Time during the load in which threads of the server waited for a core.
        counts: Increase of each metric of the server during the load.
        graphs: Captured graphs, and the seconds of their capture, at the end of the load.
        seconds_to_idle: Time from the end of the load until no request runs or waits (None: not reached).
        status_while_draining: Status of `/health` after SIGTERM.
        last_stream: Outcome of the stream that runs during SIGTERM.
        exit_status: Exit status of the server (None: it did not exit in time).
        fault: Error that ended the test early ("": none).
        log: Standard error of the server.
    """

    planned: list[Planned]
    outcomes: list[Outcome] = field(default_factory=list)
    num_stuck: int = 0
    resident_bytes: list[tuple[int, int]] = field(default_factory=list)
    device_bytes: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    core_wait_seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    graphs: tuple[int, float] = (0, 0.0)
    seconds_to_idle: float | None = None
    status_while_draining: int = 0
    last_stream: Outcome | None = None
    exit_status: int | None = None
    fault: str = ""
    log: str = ""

    @property
    def new_tokens(self) -> float:
        """Generated tokens, including those of cancelled replies."""
        return self.counts["openmimo_generated_tokens_total"]


@dataclass(frozen=True)
class Check:
    """A condition that must hold, and the observation."""

    name: str
    holds: bool
    seen: str


def main(arguments: list[str] | None = None) -> None:
    """Runs the test, prints and writes the results. Exits with 1, without writing, if a check fails."""
    options = _parser().parse_args(arguments)
    num_requests = min(options.requests, QUICK_REQUESTS) if options.quick else options.requests
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        if options.checkpoint is None:
            options.checkpoint, gigabytes = _save_random(Path(folder) / "random", device)
            options.cache_gigabytes = options.cache_gigabytes or gigabytes
        server = ServerProcess(_serve_arguments(options, device), Path(folder) / "server.log")
        print(f"[{time.strftime('%H:%M:%S')}] the server listens", flush=True)
        try:
            findings = asyncio.run(soak(server, device, num_requests, options))
        finally:
            server.kill()
        findings.log = server.log.read_text()
    rows, remarks, checks = rows_of(findings), remarks_of(findings, options.clients), checks_of(findings, device)
    print_rows(rows)
    print(*remarks, *(f"{'ok  ' if check.holds else 'FAIL'} {check.name}: {check.seen}" for check in checks), sep="\n")
    print_counts(findings)
    if not all(check.holds for check in checks):
        sys.exit(1)
    if not (options.no_write or options.quick):
        remarks += [f"{check.name}: {check.seen}." for check in checks]
        path = write_rows("bench_server", rows, device=device, threads=options.threads, remarks=tuple(remarks))
        print(f"wrote {path}")


def _save_random(folder: Path, device: torch.device) -> tuple[Path, float]:
    """Saves random weights for a device; returns their folder and the gigabytes of the cache."""
    if device.type == "cpu":
        save_random_tiny(folder)
        return folder, _TINY_CACHE_GIGABYTES
    save_random_med(folder, device)
    torch.cuda.empty_cache()
    print(f"[{time.strftime('%H:%M:%S')}] the model is saved", flush=True)
    return folder, _MED_CACHE_GIGABYTES


def _serve_arguments(options: argparse.Namespace, device: torch.device) -> list[str]:
    arguments = [str(options.checkpoint), "--threads", str(options.threads), "--device", str(device)]
    arguments += ["--max-queue", str(max(options.clients // 2, 1)), "--max-sequences", str(options.max_sequences)]
    arguments += ["--speculative", "False"] if options.no_drafts else []
    return arguments + (["--cache-gigabytes", str(options.cache_gigabytes)] if options.cache_gigabytes else [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_server", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, auto, or a torch device (default: cpu)")
    parser.add_argument("--requests", type=int, default=500, help="number of requests (default: 500)")
    parser.add_argument("--clients", type=int, default=64, help="concurrent clients (default: 64)")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint to serve (default: a random one)")
    cache_help = (
        "cache size; on a CPU it must fill early, or memory grows (default: 1/32 on a CPU, else 4; with --checkpoint: "
        "automatic)"
    )
    parser.add_argument("--cache-gigabytes", type=float, help=cache_help)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the server's model (default: 1)")
    parser.add_argument("--max-sequences", type=int, default=64, help="requests that run at once (default: 64)")
    parser.add_argument("--no-drafts", action="store_true", help="serve without drafts")
    parser.add_argument("--limit-seconds", type=float, help="time limit of the load (default: 60 and 1 a request)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests and their order (default: 0)")
    parser.add_argument("--quick", action="store_true", help=f"send {QUICK_REQUESTS} requests, write no results")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    return parser


# --- soak test --------------------------------------------------------------------------------------------------------


async def soak(server: ServerProcess, device: torch.device, num_requests: int, options: argparse.Namespace) -> Findings:
    """Warms up the server, sends the load, waits until the server is idle, and stops it during a reply."""
    connection = Connection(server.url)
    model = json.loads(await (await connection.request("GET", "/v1/models")).read())["data"][0]
    for planned in warm_up(model["id"]):
        await ask(connection, planned)
    positions = model["max_model_len"]
    findings = Findings(plan_load(num_requests, model_name=model["id"], positions=positions, seed=options.seed))
    limit = options.limit_seconds or 60 + num_requests
    used = _device_bytes(device)
    try:
        await _load(connection, server, findings, options.clients, limit)
        findings.seconds_to_idle = await _seconds_to_idle(connection)
        findings.resident_bytes.append((len(findings.outcomes), server.resident_bytes))
        findings.device_bytes = (used, _device_bytes(device))
        last = long_stream(model["id"], min(_STREAM_AT_THE_END_TOKENS, positions // 2))
        await _end(connection, server, findings, last)
    except (ConnectionError, ValueError) as error:
        findings.fault = f"{type(error).__name__} {error}"
    return findings


def _device_bytes(device: torch.device) -> int:
    """Used memory of an accelerator, by all processes; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


async def _load(
    connection: Connection, server: ServerProcess, findings: Findings, num_clients: int, limit_seconds: float
) -> None:
    """Sends all requests, each as soon as a client is free. Cancels those that do not finish within the time limit."""
    before = await _metrics(connection)
    waiting = iter(findings.planned)
    start, cpu, core_wait = time.perf_counter(), server.cpu_seconds, server.core_wait_seconds

    async def work() -> None:
        own = Connection(server.url)
        for planned in waiting:
            findings.outcomes += await ask(own, planned)
        own.close()

    async def watch() -> None:
        shown = start
        while True:
            findings.resident_bytes.append((len(findings.outcomes), server.resident_bytes))
            if time.perf_counter() - shown > _SHOW_SECONDS:
                shown = time.perf_counter()
                print(f"[{time.strftime('%H:%M:%S')}] {len(findings.outcomes)} replies", flush=True)
            await asyncio.sleep(_SAMPLE_SECONDS)

    watcher = asyncio.create_task(watch())
    workers = [asyncio.create_task(work()) for _ in range(num_clients)]
    done, stuck = await asyncio.wait(workers, timeout=limit_seconds)
    findings.num_stuck = len(stuck)
    for task in (watcher, *stuck):
        task.cancel()
    await asyncio.gather(watcher, *stuck, return_exceptions=True)
    for task in done:
        task.result()
    findings.seconds = time.perf_counter() - start
    findings.cpu_seconds = server.cpu_seconds - cpu
    findings.core_wait_seconds = server.core_wait_seconds - core_wait
    after = await _metrics(connection)
    findings.counts = Counter(after)
    findings.counts.subtract(before)
    findings.graphs = (int(after["openmimo_graphs"]), after["openmimo_graph_capture_seconds"])


async def _seconds_to_idle(connection: Connection) -> float | None:
    """Returns the time until no request runs or waits; None if the limit is exceeded."""
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < _IDLE_SECONDS:
        metrics = await _metrics(connection)
        if metrics["openmimo_requests_running"] == 0 == metrics["openmimo_requests_waiting"]:
            return waited
        await asyncio.sleep(0.05)
    return None


async def _end(connection: Connection, server: ServerProcess, findings: Findings, last: Planned) -> None:
    """Sends SIGTERM during a reply. The server must finish this reply and refuse new requests."""
    stream = asyncio.create_task(ask(Connection(server.url), last))
    while not stream.done() and (await _metrics(connection))["openmimo_requests_running"] == 0:
        await asyncio.sleep(0.005)
    server.terminate()
    try:
        async with asyncio.timeout(_EXIT_SECONDS):
            status = 200
            while status == 200 and not stream.done():
                response = await connection.request("GET", "/health")
                await response.read()
                status = response.status
            findings.status_while_draining = status
            (findings.last_stream,) = await stream
    except TimeoutError:
        stream.cancel()
    findings.exit_status = await asyncio.to_thread(server.wait, _EXIT_SECONDS)


async def _metrics(connection: Connection) -> dict[str, float]:
    text = (await (await connection.request("GET", "/metrics")).read()).decode()
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


# --- results ----------------------------------------------------------------------------------------------------------


def rows_of(findings: Findings) -> list[Row]:
    """Returns the latencies and throughput as rows."""
    answered = [outcome for outcome in findings.outcomes if outcome.num_tokens and not outcome.problem]
    first = [outcome.seconds_to_first for outcome in answered if outcome.seconds_to_first is not None]
    per_token = [outcome.seconds_per_token for outcome in answered if outcome.seconds_per_token is not None]
    in_all = [outcome.seconds_in_all for outcome in answered]
    rows = _percentile_rows("time to first token", first, (50, 95, 99))
    rows += _percentile_rows("time per output token", per_token, (50, 95))
    rows += _percentile_rows("request", in_all, (50, 95))
    if not findings.new_tokens:
        return rows  # the load did not finish
    thousands = findings.new_tokens / 1000
    rate = f"{findings.new_tokens / findings.seconds:.0f} tokens/s, {findings.new_tokens:.0f} tokens in total"
    rows.append(Row("all clients, per token", findings.seconds / thousands, note=rate))
    cpu = f"{findings.cpu_seconds:.1f} s in {findings.seconds:.1f} s"
    rows.append(Row("CPU of the server per 1,000 tokens", 1e3 * findings.cpu_seconds / thousands, note=cpu))
    return rows


def _percentile_rows(name: str, seconds: list[float], percents: tuple[int, ...]) -> list[Row]:
    if len(seconds) < 2:
        return []
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    note = f"of {len(seconds)}"
    return [Row(f"{name}, p{percent}", 1e3 * cuts[percent - 1], note=note) for percent in percents]


def remarks_of(findings: Findings, num_clients: int) -> list[str]:
    """Returns sentences on requests, memory, prefix hits and waiting time."""
    statuses = Counter("cancelled" if o.was_cancelled else str(o.status) for o in findings.outcomes)
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    refusals = sum(outcome.num_refusals for outcome in findings.outcomes)
    megabytes = [resident / 2**20 for _, resident in findings.resident_bytes]
    read, hit = (findings.counts[f"openmimo_{name}_tokens_total"] for name in ("prompt", "prefix_hit"))
    reasons = Counter(reason for outcome in findings.outcomes for reason in outcome.finish_reasons)
    used, used_after = (number / 2**20 for number in findings.device_bytes)
    num_graphs, seconds = findings.graphs
    on_device = [
        f"Memory of the accelerator: {used:.0f} MiB in use before the load, {used_after:.0f} MiB after it; "
        f"{num_graphs} graphs, captured in {seconds:.1f} s.",
        f"Texts of repeated requests: {_repeated_texts(findings.outcomes)}.",
    ]
    return [
        f"{len(findings.outcomes)} requests of {num_clients} clients: {counts}; {refusals} earlier attempts got 429.",
        f"Finish reasons: {', '.join(f'{count} x {reason}' for reason, count in sorted(reasons.items()))}.",
        f"Resident memory of the server: {megabytes[0]:.1f} MiB at the start, {megabytes[-1]:.1f} MiB at the end, "
        f"{max(megabytes):.1f} MiB at most.",
        *(on_device if used else []),
        f"Of {read:.0f} prompt tokens, {hit:.0f} were cached.",
        f"The server's threads waited for a core for {findings.core_wait_seconds:.1f} s of {findings.seconds:.1f} s; "
        "clients and other processes use the same cores.",
    ]


def print_counts(findings: Findings) -> None:
    """Prints a table of the requests of each kind, and of all."""
    table = Table("kind")
    for title in ("requests", "200", "4xx", "5xx", "cut", "lost", "wrong", "first token p50", "p95, ms"):
        table.add_column(title, justify="right")
    kinds = sorted({outcome.planned.kind for outcome in findings.outcomes})
    for kind in [*kinds, "all"]:
        outcomes = [outcome for outcome in findings.outcomes if kind in (outcome.planned.kind, "all")]
        lost = sum(outcome.problem.startswith("lost") for outcome in outcomes)
        first = [outcome.seconds_to_first for outcome in outcomes if outcome.seconds_to_first is not None]
        cuts = statistics.quantiles(first, n=20, method="inclusive") if len(first) > 1 else []
        numbers = [
            len(outcomes),
            *(sum(outcome.status // 100 == hundred for outcome in outcomes) for hundred in (2, 4, 5)),
            sum(outcome.was_cancelled for outcome in outcomes),
            lost,
            sum(bool(outcome.problem) for outcome in outcomes) - lost,
        ]
        table.add_row(kind, *map(str, numbers), *(f"{1e3 * cuts[place]:.0f}" if cuts else "" for place in (9, 18)))
    Console(width=120).print(table)


def checks_of(findings: Findings, device: torch.device) -> list[Check]:
    """Returns all checks."""
    outcomes = findings.outcomes
    problems = [f"{o.planned.path} {o.planned.content[:120]!r}: {o.problem}" for o in outcomes if o.problem]
    failures = [outcome for outcome in outcomes if outcome.status >= 500 or "server_error" in outcome.problem]
    cancelled = sum(outcome.was_cancelled for outcome in outcomes)
    waited = findings.seconds_to_idle
    aborted = findings.counts['openmimo_replies_total{finish_reason="abort"}']
    seen = f"{cancelled} by clients, {aborted:.0f} aborted by the server"
    return [
        Check("every request ends", not findings.num_stuck, f"{len(outcomes)} ended, {findings.num_stuck} did not"),
        Check("every reply is correct", not problems, "; ".join(problems[:5]) or "no problem"),
        Check("no 5xx", not failures, f"{len(failures)}"),
        Check("cancelled", cancelled > 0, seen),
        Check("idle after the load", waited is not None, "never" if waited is None else f"after {waited:.2f} s"),
        *([_memory_check(findings), _same_text_check(outcomes)] if device.type == "cpu" else [_growth_check(findings)]),
        *_drain_checks(findings),
        Check("the server answers until it stops", not findings.fault, findings.fault or "yes"),
        Check("the server's log is empty", not findings.log, findings.log[-2000:] or "yes"),
    ]


def _drain_checks(findings: Findings) -> list[Check]:
    last, status = findings.last_stream, findings.status_while_draining
    finishes = last is not None and not last.problem
    seen = "never" if last is None else last.problem or f"{last.num_tokens} tokens"
    return [
        Check("new requests get 503 while the server drains", status == 503, f"status {status}"),
        Check("the running reply is finished while the server drains", finishes, seen),
        Check("exit status 0 after SIGTERM", findings.exit_status == 0, str(findings.exit_status)),
    ]


def _memory_check(findings: Findings) -> Check:
    quarter = len(findings.planned) / 4
    later = [resident for num_done, resident in findings.resident_bytes if num_done >= quarter]
    growth = later[-1] / later[0] - 1 if later else float("inf")
    megabytes = f"{later[0] / 2**20:.1f} to {later[-1] / 2**20:.1f} MiB" if later else "no samples"
    seen = f"{megabytes} ({growth:+.1%}; at most {MAX_MEMORY_GROWTH:.0%})"
    return Check("memory is flat after a quarter of the requests", growth < MAX_MEMORY_GROWTH, seen)


def _growth_check(findings: Findings) -> Check:
    """On an accelerator, graphs and kernels take memory of the host until the last shape was seen."""
    half = len(findings.planned) / 2
    later = [resident for num_done, resident in findings.resident_bytes if num_done >= half]
    growth = later[-1] / later[0] - 1 if later else float("inf")
    return Check(
        "memory is flat after half of the requests",
        growth < MAX_MEMORY_GROWTH,
        f"{growth:+.1%} (at most {MAX_MEMORY_GROWTH:.0%})",
    )


def _texts_by_group(outcomes: list[Outcome]) -> dict[str, list[tuple[str, ...]]]:
    texts = defaultdict(list)
    for outcome in outcomes:
        if outcome.planned.group and not outcome.problem:
            texts[outcome.planned.group].append(outcome.texts)
    return texts


def _repeated_texts(outcomes: list[Outcome]) -> str:
    texts = sorted(_texts_by_group(outcomes).items())
    return ", ".join(f"{group} {len(found)} times, {len(set(found))} text(s)" for group, found in texts)


def _same_text_check(outcomes: list[Outcome]) -> Check:
    texts = _texts_by_group(outcomes)
    holds = bool(texts) and all(len(set(found)) == 1 for found in texts.values())
    return Check("same request and seed, same text", holds, _repeated_texts(outcomes))


if __name__ == "__main__":
    main()
