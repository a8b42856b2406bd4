"""Drafts of each sequence: the engine's choice against plain decoding, fixed numbers of drafts, and an oracle.

    python -m benchmarks.bench_drafts [CHECKPOINT] [--batches 1 8 32 64] [--rounds 3] [--device auto] [--no-write]

The load is mixed, in turns: held-out Python files, prose of Python's manual sampled at temperature 1, and JSON files of
this project. Code and JSON have temperature 0.02, which is nearly greedy and replays the same graphs. Each request has
a prompt of 96 tokens and gets 128 new ones. A finished request is replaced at once, so the batch is always full. A
round has the same number of tokens for all sides, prompts included; sides take turns. The first round of each side is
shorter and not timed. Sides with drafts share an engine, and so its graphs. Weights are in bfloat16 on
an accelerator.

Sides: plain decoding; one, two and three drafts of every sequence; the engine's choice for each sequence (ours); an
oracle. The oracle has one number of drafts for each kind of text, found after the fact: from the acceptance of each
kind and the measured times of steps, the best combinations are computed, and the fastest of those is kept. Two other
loads compare ours with plain decoding only: code alone, and prose at temperature 2, where drafts do not pay.

Predictions: Kinds differ less than the sequences of a kind and the parts of a sequence, so ours is level with the
oracle at batch 1, and 5 % faster at 32 and 64. It is 1.05 times as fast as the best fixed number on a GPU, where a
verified row of a small model costs little, and 1.1 times on a CPU.
"""

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from benchmarks.harness import Row, print_rows, write_rows
from openmimo.core.records import Request, SamplingParams
from openmimo.data.config import SourceConfig
from openmimo.data.source import read_documents, split_of
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.engine.request_state import RequestState
from openmimo.engine.speculative import DraftPolicy, step_cost
from openmimo.runtime.device import resolve_device, synchronize

ROOT = Path(__file__).parents[1]
TINY = ROOT / "openmimo" / "assets" / "tiny-mimo"
PROMPT, NEW = 96, 128
VALIDATION_FRACTION = 0.05  # as in recipes/tiny_cpu.py, so that the same files are held out
TEMPERATURES = {"code": 0.02, "prose": 1.0, "json": 0.02, "unpredictable": 2.0}
MIXED = ("code", "prose", "json")
NUM_ORACLES = 3  # combinations that are measured
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
    """Stands in for a `DraftPolicy`: a fixed number of drafts for each kind of text."""

    def __init__(self, numbers: tuple[int, ...]):
        self.numbers = numbers
        self.kinds: dict[int, int] = {}

    def choose(self, seats: list[int], owners: list[int], limits: list[int]) -> list[int]:
        """As `DraftPolicy.choose`."""
        numbers = [self.numbers[self.kinds[owner]] for owner in owners]
        return [min(number, limit) for number, limit in zip(numbers, limits, strict=True)]

    def judge(self, seats: list[int], owners: list[int], offered: list[int], accepted: list[int]) -> None:
        """Learns nothing."""

    def observe(self, counts: list[int], num_tokens: int, seconds: float) -> None:
        """Learns nothing."""


@dataclass
class Side:
    """One way to decode a load without end, in rounds that begin with an empty batch.

    Attributes:
        engine: The engine, which other sides use in their turns.
        policy: The policy of drafts; None without drafts.
        kinds: The kinds of the load, in turns.
        prompts: The prompts by kind.
        batch: Requests at once.
        rounds: Milliseconds per token of each timed round.
        texts: The new tokens of the requests that have ended, by number.
        num_sent: Requests so far.
        steps_by_drafts: Sequences of decoding passes by the number of their drafts.
        num_decoded: Tokens of these passes.
        judged: For each kind and head, the drafts that were verified and those that were right.
    """

    engine: Engine
    policy: DraftPolicy | ByKind | None
    kinds: tuple[str, ...]
    prompts: dict[str, list[list[int]]]
    batch: int
    rounds: list[float] = field(default_factory=list)
    texts: dict[int, list[int]] = field(default_factory=dict)
    num_sent: int = 0
    steps_by_drafts: Counter[int] = field(default_factory=Counter)
    num_decoded: int = 0
    judged: np.ndarray = field(default_factory=lambda: np.zeros((len(MIXED), 2, 1)))

    @property
    def milliseconds(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds)

    def run(self, num_tokens: int) -> float:
        """Decodes this many tokens. Returns milliseconds per token."""
        stats, device = self.engine.stats, self.engine.model.device
        if self.policy is not None:
            self.engine._runner._draft_policy = self.policy  # type: ignore[assignment]
        self.engine.reset_stats()
        running: dict[str, int] = {}
        synchronize(device)
        start = time.perf_counter()
        while stats.num_new_tokens < num_tokens:
            while len(running) < self.batch:
                running[self._send()] = self.num_sent
                self.num_sent += 1
            for state in self.engine.step():
                if state.finish_reason:
                    number = running.pop(state.request.id)
                    self.texts[number] = state.tokens[state.prompt_length :]
                    self._judge(number % len(self.kinds), state)
        synchronize(device)
        milliseconds = 1e3 * (time.perf_counter() - start) / stats.num_new_tokens
        self.steps_by_drafts.update(dict(enumerate(stats.steps_by_drafts)))
        self.num_decoded += stats.num_decoded_tokens
        for name in running:
            self.engine.abort(name)
        while self.engine.has_work:
            self.engine.step()
        return milliseconds

    def _judge(self, kind: int, state: RequestState) -> None:
        """Counts the drafts of a request. A draft is verified if all before it were right."""
        right = np.array(state.accepted_by_head)
        steps = np.array([sum(state.steps_by_drafts[head + 1 :]) for head in range(len(right))])
        self.judged = np.resize(self.judged, (len(MIXED), 2, len(right))) if not self.judged.any() else self.judged
        self.judged[kind, 0] += np.minimum(steps, np.concatenate([steps[:1], right[:-1]]))
        self.judged[kind, 1] += right

    def _send(self) -> str:
        turn, kind = divmod(self.num_sent, len(self.kinds))
        name = self.kinds[kind]
        prompts = self.prompts[name]
        params = SamplingParams(max_tokens=NEW, temperature=TEMPERATURES[name], seed=self.num_sent, ignore_eos=True)
        state = self.engine.submit(Request(str(self.num_sent), tuple(prompts[turn % len(prompts)]), params))
        if isinstance(self.policy, ByKind):
            self.policy.kinds[state.arrival] = kind
        return state.request.id


class Bench:
    """The measurement of one checkpoint on one device."""

    def __init__(self, checkpoint: Path, device: str, rounds: int, most_sequences: int):
        loaded = LLM(
            checkpoint,
            device=device,
            dtype="float32" if resolve_device(device).type == "cpu" else "bfloat16",
            speculative=False,
            max_sequences=most_sequences,
            prefix_cache=False,
        )
        assert loaded.tokenizer is not None
        self._prompts = prompts_of(loaded.tokenizer)
        self._plain = loaded.engine
        config = EngineConfig(max_sequences=most_sequences, prefix_cache=False, mixed_prefill_tokens="all")
        self._drafting = Engine(loaded.model, loaded.tokenizer, config)
        self._num_heads = self._drafting.num_drafts
        self._rounds = rounds

    def rows(self, batch: int, *, is_deep: bool, loads: tuple[str, ...]) -> Iterator[Row]:
        """The measurements of one size of batch."""
        num_tokens = NEW * max(batch, len(MIXED))
        sides = {"plain": self._side(MIXED, batch, None)}
        for number in range(1, self._num_heads + 1):
            sides[f"{number} of every sequence"] = self._side(MIXED, batch, ByKind((number,) * len(MIXED)))
        policy = self._policy()
        ours = self._side(MIXED, batch, policy)
        self._race({**sides, "ours": ours}, num_tokens)
        note = _note(ours, sides["plain"])
        yield from (_row("mixed", batch, ours, sides[name], name, None, note) for name in sides)
        best = min(sides, key=lambda name: sides[name].milliseconds)
        yield _row("mixed", batch, ours, sides[best], f"best fixed: {best}", BEST_FIXED_GOAL, note)
        oracle, numbers = self._oracle(batch, list(sides.values()), policy, num_tokens)
        by_kind = ", ".join(f"{kind} {number}" for kind, number in zip(MIXED, numbers, strict=True))
        yield _row("mixed", batch, ours, oracle, f"oracle: {by_kind}", ORACLE_GOAL, note)
        for kind in loads:
            plain, alone = self._side((kind,), batch, None), self._side((kind,), batch, self._policy())
            self._race({"plain": plain, "ours": alone}, num_tokens)
            goal = DEEP_GOALS.get(batch, PLAIN_GOAL) if is_deep and kind == "code" else PLAIN_GOAL
            yield _row(kind, batch, alone, plain, "plain", goal, _note(alone, plain))

    def prepare(self, batch: int) -> None:
        """Compiles what the measurements of this size of batch run, for a cache on disk."""
        self._side(MIXED, batch, None).run(4 * batch)
        for numbers in itertools.product(range(self._num_heads + 1), repeat=2):
            self._side(MIXED, batch, ByKind((max(numbers), *numbers))).run(4 * batch)

    def _policy(self) -> DraftPolicy:
        return DraftPolicy(self._num_heads, adaptive=True, cost=step_cost(self._plain.model.config))

    def _side(self, kinds: tuple[str, ...], batch: int, policy: DraftPolicy | ByKind | None) -> Side:
        return Side(self._plain if policy is None else self._drafting, policy, kinds, self._prompts, batch)

    def _race(self, sides: dict[str, Side], num_tokens: int) -> None:
        """Runs the rounds of all sides in turns."""
        for number in range(-1, self._rounds):
            for side in sides.values():
                milliseconds = side.run(num_tokens if number >= 0 else num_tokens // 2)
                if number >= 0:
                    side.rounds.append(milliseconds)
        shown = ", ".join(f"{name} {side.milliseconds:.4f}" for name, side in sides.items())
        load = next(iter(sides.values()))
        print(f"[{time.strftime('%H:%M:%S')}] {load.kinds}, batch {load.batch}, ms per token: {shown}", flush=True)

    def _oracle(
        self, batch: int, fixed: list[Side], policy: DraftPolicy, num_tokens: int
    ) -> tuple[Side, tuple[int, ...]]:
        """The fastest side with a number of drafts for each kind, and the numbers."""
        found = {(number,) * len(MIXED): side for number, side in enumerate(fixed)}
        judged = fixed[-1].judged
        gains = np.cumprod(judged[:, 1] / np.maximum(judged[:, 0], 1), axis=1)
        seconds, share = policy.times.seconds(batch), batch / len(MIXED)

        def rate(numbers: tuple[int, ...]) -> float:
            tokens = sum(share * (1 + gains[kind, :number].sum()) for kind, number in enumerate(numbers))
            return tokens / seconds[max(numbers), round(share * sum(numbers))]

        combinations = itertools.product(range(self._num_heads + 1), repeat=len(MIXED))
        for numbers in sorted((each for each in combinations if each not in found), key=rate)[-NUM_ORACLES:]:
            side = found[numbers] = self._side(MIXED, batch, ByKind(numbers))
            side.run(num_tokens // 4)  # may capture graphs
            side.rounds = [side.run(num_tokens) for _ in range(self._rounds)]
            print(f"{numbers} of {MIXED}: {side.milliseconds:.4f} ms per token", flush=True)
        best = min(found, key=lambda numbers: found[numbers].milliseconds)
        return found[best], best


def _row(load: str, batch: int, ours: Side, other: Side, name: str, goal: float | None, note: str) -> Row:
    return Row(f"{load}, batch {batch}, per token", ours.milliseconds, other.milliseconds, name, goal=goal, note=note)


def _note(ours: Side, plain: Side) -> str:
    """What ours did, and how many texts are those of plain decoding."""
    both = ours.texts.keys() & plain.texts.keys()
    same = sum(ours.texts[number] == plain.texts[number] for number in both)
    num_steps = max(ours.steps_by_drafts.total(), 1)
    shares = ", ".join(f"{count / num_steps:.0%}" for _, count in sorted(ours.steps_by_drafts.items()))
    return (
        f"{ours.num_decoded / num_steps:.2f} tokens per step; steps with 0, 1, ... drafts: {shares}; "
        f"{same} of {len(both)} texts as plain"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures all sizes of batch, prints a table, and writes the results unless --no-write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=TINY)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--loads", nargs="*", default=["code", "unpredictable"], help="other loads than the mixed one")
    parser.add_argument("--seconds", type=float, default=3600.0, help="end with the first measurement after this time")
    parser.add_argument("--prepare", action="store_true", help="only compile, for a cache on disk")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args(arguments)
    device, start, rows = resolve_device(options.device), time.perf_counter(), []
    bench = Bench(options.checkpoint, options.device, options.rounds, max(options.batches))
    is_deep = options.checkpoint != TINY
    for batch in options.batches:
        if options.prepare:
            bench.prepare(batch)
            continue
        for row in bench.rows(batch, is_deep=is_deep, loads=tuple(options.loads)):
            rows.append(row)
            if not options.no_write:
                write_rows("bench_drafts" if is_deep else "bench_drafts_tiny", rows, device=device, threads=1)
            if time.perf_counter() - start > options.seconds:
                print(f"stopped after {options.seconds:g} seconds")
                return print_rows(rows)
    print_rows(rows)


if __name__ == "__main__":
    main()
