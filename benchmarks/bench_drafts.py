"""Drafts of each sequence: the engine's choice against plain decoding, fixed numbers of drafts, and an oracle.

    python -m benchmarks.bench_drafts [CHECKPOINT] [--batches 1 8 32 64] [--rounds 3] [--device auto] [--no-write]

The load is mixed: held-out Python files continued greedily, prose of Python's manual sampled at
temperature 1, and JSON files of this project continued greedily, in turns. Each request has a prompt of 96 tokens and
gets 128 new ones. A finished request is replaced at once, so the batch is always full. A round of a side is the same
number of tokens for all sides, prompts included; sides take turns. The first round of each side is not timed.

Sides: plain decoding; one, two and three heads that always draft; the engine's choice for each sequence (ours); an
oracle. The oracle has one number of drafts for each kind of text, found after the fact: from the best fixed number, one
kind after the other is changed to what is fastest. Two other loads compare ours with plain decoding only: code alone,
and prose at temperature 2, where drafts do not pay.

Predictions: Kinds differ less than the sequences of a kind and the parts of a sequence, so ours is level with the
oracle at batch 1, and 5 % faster at 32 and 64. It is 1.05 times as fast as the best fixed number on a GPU, where a
verified row of a small model costs little, and 1.1 times on a CPU.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.harness import Row, print_rows, write_rows
from openmimo.core.records import Request, SamplingParams
from openmimo.data.config import SourceConfig
from openmimo.data.source import read_documents, split_of
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.runtime.device import resolve_device, synchronize

ROOT = Path(__file__).parents[1]
TINY = ROOT / "openmimo" / "assets" / "tiny-mimo"
PROMPT, NEW = 96, 128
VALIDATION_FRACTION = 0.05  # as in recipes/tiny_cpu.py, so that the same files are held out
TEMPERATURES = {"code": 0.0, "prose": 1.0, "json": 0.0, "unpredictable": 2.0}
MIXED = ("code", "prose", "json")
BEST_FIXED_GOAL, ORACLE_GOAL, PLAIN_GOAL = 1.10, 0.97, 0.98
DEEP_GOALS = {1: 2.2, 8: 1.6, 32: 1.2}  # against plain, on code


def prompts_of(tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """The prompts by kind of text."""
    code = (
        text
        for text in read_documents(SourceConfig("python_stdlib", max_megabytes=8.0))
        if split_of(text, VALIDATION_FRACTION) == "validation"
    )
    prose = (text for _, text in sorted(topics.items()))
    json = (path.read_text() for path in sorted(ROOT.glob("benchmarks/results/**/*.json")))
    found = {name: _beginnings(tokenizer, texts) for name, texts in (("code", code), ("prose", prose), ("json", json))}
    return {**found, "unpredictable": found["prose"]}


def _beginnings(tokenizer: Tokenizer, texts: Iterator[str], most: int = 64) -> list[list[int]]:
    """Passages of 96 tokens, one or more of each text."""
    found: list[list[int]] = []
    for text in texts:
        for start in range(0, len(text) - 20 * PROMPT, 8000):
            ids = tokenizer.encode(text[start : start + 20 * PROMPT])
            if len(ids) >= PROMPT and len(found) < most:
                found.append(ids[:PROMPT])
    return found


class ByKind:
    """Stands in for a `DraftPolicy`: a fixed number of drafts for each kind of text. Kinds arrive in turns."""

    def __init__(self, numbers: tuple[int, ...]):
        self.numbers = numbers

    def choose(self, seats: list[int], owners: list[int], limits: list[int]) -> list[int]:
        """As `DraftPolicy.choose`."""
        return [
            min(self.numbers[owner % len(self.numbers)], limit) for owner, limit in zip(owners, limits, strict=True)
        ]

    def judge(self, seats: list[int], owners: list[int], offered: list[int], accepted: list[int]) -> None:
        """Learns nothing."""

    def observe(self, counts: list[int], num_tokens: int, seconds: float) -> None:
        """Learns nothing."""


@dataclass
class Side:
    """An engine that serves a load without end, and the milliseconds per token of its rounds.

    Attributes:
        engine: The engine.
        kinds: The kinds of the load, in turns.
        prompts: The prompts by kind.
        batch: Requests at once.
        rounds: Milliseconds per token of each timed round.
        texts: The new tokens of the requests that have ended, by number.
    """

    engine: Engine
    kinds: tuple[str, ...]
    prompts: dict[str, list[list[int]]]
    batch: int
    rounds: list[float] = field(default_factory=list)
    texts: dict[int, list[int]] = field(default_factory=dict)
    num_sent: int = 0

    @property
    def milliseconds(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds)

    def run(self, num_tokens: int) -> float:
        """Decodes this many tokens. Returns milliseconds per token."""
        stats = self.engine.stats
        device = self.engine.model.device
        synchronize(device)
        first, start = stats.num_new_tokens, time.perf_counter()
        while stats.num_new_tokens - first < num_tokens:
            while self.engine.num_running + self.engine.num_waiting < self.batch:
                self._send()
            for state in self.engine.step():
                if state.finish_reason:
                    self.texts[int(state.request.id)] = state.tokens[state.prompt_length :]
        synchronize(device)
        return 1e3 * (time.perf_counter() - start) / (stats.num_new_tokens - first)

    def _send(self) -> None:
        turn, kind = divmod(self.num_sent, len(self.kinds))
        name = self.kinds[kind]
        prompts = self.prompts[name]
        params = SamplingParams(max_tokens=NEW, temperature=TEMPERATURES[name], seed=self.num_sent, ignore_eos=True)
        request = Request(str(self.num_sent), tuple(prompts[turn % len(prompts)]), params)
        self.engine.submit(request)
        self.num_sent += 1


class Bench:
    """The measurement of one checkpoint on one device."""

    def __init__(self, checkpoint: Path, device: str, rounds: int):
        self._llm = LLM(checkpoint, device=device, speculative=False)
        assert self._llm.tokenizer is not None
        self._prompts = prompts_of(self._llm.tokenizer)
        self._rounds = rounds

    def rows(self, batch: int, *, is_deep: bool) -> list[Row]:
        """The measurements of one size of batch."""
        num_tokens = NEW * len(MIXED) * max(batch, 2)
        sides = {"plain": self._side(MIXED, batch, speculative=False)}
        heads = self._llm.model.config.num_mtp_heads
        for number in range(1, heads + 1):
            sides[f"{number} of every sequence"] = self._side(MIXED, batch, num_drafts=number, adaptive_drafts=False)
        sides["ours"] = self._side(MIXED, batch)
        self._race(sides, num_tokens)
        oracle, numbers = self._oracle(batch, sides, num_tokens)
        self._race({"oracle": oracle, **sides}, num_tokens, warm_up=False)
        ours, plain = sides.pop("ours"), sides["plain"]
        best = min(sides, key=lambda name: sides[name].milliseconds)
        note = _note(ours, plain)
        rows = [_row("mixed", batch, ours, sides[name], name, None, note) for name in sides]
        rows.append(_row("mixed", batch, ours, sides[best], f"best fixed: {best}", BEST_FIXED_GOAL, note))
        by_kind = ", ".join(f"{kind} {number}" for kind, number in zip(MIXED, numbers, strict=True))
        rows.append(_row("mixed", batch, ours, oracle, f"oracle: {by_kind}", ORACLE_GOAL, note))
        for kind in ("code", "unpredictable"):
            sides = {"plain": self._side((kind,), batch, speculative=False), "ours": self._side((kind,), batch)}
            self._race(sides, num_tokens)
            goal = DEEP_GOALS.get(batch, PLAIN_GOAL) if is_deep and kind == "code" else PLAIN_GOAL
            note = _note(sides["ours"], sides["plain"])
            rows.append(_row(kind, batch, sides["ours"], sides["plain"], "plain", goal, note))
        return rows

    def _side(self, kinds: tuple[str, ...], batch: int, **settings: Any) -> Side:
        config = EngineConfig(
            max_sequences=batch, prefix_cache=False, cache_gigabytes=self._gigabytes(batch), **settings
        )
        return Side(Engine(self._llm.model, self._llm.tokenizer, config), kinds, self._prompts, batch)

    def _gigabytes(self, batch: int) -> float:
        arena = self._llm.engine.arena
        pages = arena.layout.pages_per_row * (8 + (PROMPT + NEW) // 16)
        return 2 * (batch + 1) * pages * arena.page_bytes / 2**30 + 0.01

    def _race(self, sides: dict[str, Side], num_tokens: int, *, warm_up: bool = True) -> None:
        """Runs the rounds of all sides in turns."""
        for number in range(-warm_up, self._rounds):
            for side in sides.values():
                milliseconds = side.run(num_tokens)
                if number >= 0:
                    side.rounds.append(milliseconds)
        shown = ", ".join(f"{name} {side.milliseconds:.3f}" for name, side in sides.items())
        print(
            f"[{time.strftime('%H:%M:%S')}] batch {next(iter(sides.values())).batch}, ms per token: {shown}", flush=True
        )

    def _oracle(self, batch: int, sides: dict[str, Side], num_tokens: int) -> tuple[Side, tuple[int, ...]]:
        """The side with the best number of drafts for each kind, and the numbers."""
        fixed = [side.milliseconds for name, side in sides.items() if name != "ours"]
        side = self._side(MIXED, batch)
        numbers = [fixed.index(min(fixed))] * len(MIXED)
        policy = ByKind(tuple(numbers))
        side.engine._runner._draft_policy = policy  # type: ignore[assignment]
        for number in range(len(fixed)):  # the first use of a number captures graphs
            policy.numbers = (number,) * len(MIXED)
            side.run(num_tokens // 8)
        policy.numbers = tuple(numbers)
        best = side.run(num_tokens)
        for kind, number in itertools.product(range(len(MIXED)), range(len(fixed))):
            if number != numbers[kind]:
                policy.numbers = (*numbers[:kind], number, *numbers[kind + 1 :])
                milliseconds = side.run(num_tokens)
                if milliseconds < best:
                    best, numbers[kind] = milliseconds, number
        policy.numbers = tuple(numbers)
        return side, policy.numbers


def _row(load: str, batch: int, ours: Side, other: Side, name: str, goal: float | None, note: str) -> Row:
    return Row(f"{load}, batch {batch}, per token", ours.milliseconds, other.milliseconds, name, goal=goal, note=note)


def _note(ours: Side, plain: Side) -> str:
    """What ours did, and how many texts are those of plain decoding."""
    stats = ours.engine.stats.report()
    both = ours.texts.keys() & plain.texts.keys()
    same = sum(ours.texts[number] == plain.texts[number] for number in both)
    steps = ours.engine.stats.steps_by_drafts
    shares = ", ".join(f"{count / max(sum(steps), 1):.0%}" for count in steps)
    return (
        f"{stats['accepted_tokens_per_step']:.2f} tokens per step; steps with 0, 1, ... drafts: {shares}; "
        f"{same} of {len(both)} texts as plain"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures all sizes of batch, prints a table, and writes the results unless --no-write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=TINY)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no further size of batch after this time")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args(arguments)
    device, start, rows = resolve_device(options.device), time.perf_counter(), []
    bench = Bench(options.checkpoint, options.device, options.rounds)
    for batch in options.batches:
        if time.perf_counter() - start < options.seconds:
            rows += bench.rows(batch, is_deep=options.checkpoint != TINY)
    print_rows(rows)
    if not options.no_write:
        name = "bench_drafts" if options.checkpoint != TINY else "bench_drafts_tiny"
        print(f"wrote {write_rows(name, rows, device=device, threads=1)}")


if __name__ == "__main__":
    main()
