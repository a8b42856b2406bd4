"""Post-training against TRL on one CPU: samples a second of whole steps, rolling out and learning from it.

    python -m benchmarks.bench_rl --trl PYTHON [--sections grpo mopd] [--threads 1] [--rounds 3] [--quick] [--no-write]

PYTHON is the interpreter of an environment of TRL's own, made once, and never reaching for a hub:

    python3.11 -m venv trl && trl/bin/pip install torch==2.13.0
    trl/bin/pip install trl==1.16.0 accelerate datasets

Ours are the steps of `openmimo rl` (GRPO) and of `openmimo mopd` with its sampled and its full-vocabulary signal, of
the `tiny` preset with random weights (and the small vocabulary that a tokenizer learns from the prompts), at the sizes
of `recipes/tiny_cpu.py`: 128 answers a step to 16 (GRPO) or 64 (distillation) prompts of the `sorting` task, 16 tokens
each; GRPO with 64, too; and both with answers of unequal length: one token in 48 of the vocabulary ends an answer, so
that lengths are geometric with a mean of 48, cut at 256. TRL's are GRPOTrainer and DistillationTrainer (on-policy,
reverse KL over the vocabulary, the only signal it has) on the same checkpoint through transformers' own class of the
architecture, and on a dense Qwen2 with as many weights at work on a token, which is kinder to it: no experts, and fused
attention. Both sides: the same prompts and reward, answers of exactly the length stated (no end-of-text is accepted) or
of the same distribution of lengths, temperature 1, float32, one AdamW step with clipping, no reference model, no loss
of MTP heads. TRL takes the batch whole, ours in micro-batches of 8,192 tokens at most (two with answers of 64 tokens,
one otherwise). Ours also records and replays routes and writes its event log, as it always does. Answers of one length
are kind to TRL, which otherwise generates until the longest of 128 has ended and learns from a batch padded to it.
Every side is a process of its own; sides take turns within a round; a row shows the medians of the rounds on the clock,
its note the CPU time, which other load disturbs less. The floor is every product with a weight that such a step needs,
at the measured rate of large ones: one pass to roll out, three to learn, one for a teacher, and with the sampled signal
one more of the policy.

Predictions, before any measurement. At this size a step is calls, not arithmetic. Known: at batch 8 a decoding step
takes ours 12 ms and transformers 27 ms. At 128 answers: 35 against 80 ms, so rolling out 16 tokens takes 0.7 against
1.4 s, and learning (5,000 tokens forward and backward) 0.7 against 1.2 s: GRPO 1.9 times, and 2.1 times with 64 tokens,
where more of a step is decoding. Distillation adds a pass of the teacher to both, and to the sampled signal another of
the policy: 1.7 and 1.8 times. The dense Qwen2 has a third of the calls: ours is no faster, 0.8 times. The goal of 5
times would then be missed.

Of answers of unequal length, predicted before their first run and after the steps above were measured at 0.7 to 0.9
times: TRL learns from 128 x 297 positions, ours from 128 x 48 and 16 prompts of 41, a sixth; both decode for 256 steps,
ours with 48 rows instead of 128 on average, where a row costs as much as a step's calls do: GRPO 3 to 4 times,
distillation 2.5 to 3.5.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.harness import Row, print_rows, write_rows
from benchmarks.peers.side import Side
from openmimo.data.chat.conversation import encode_prompt
from openmimo.data.config import TaskConfig
from openmimo.data.task import open_task, prompt_messages
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.config import ModelConfig, active_matmul_parameters
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import tiny
from openmimo.runtime.device import measured_matmul_flops

CPU = torch.device("cpu")
TASK = TaskConfig("sorting", 10, 10)  # one difficulty: prompts of one length
SAMPLES = 128
LEARNING_RATE = 5e-4
ROUNDS = 3
GOAL = 5.0
Costs = list[dict[str, float]]


@dataclass(frozen=True)
class Case:
    """One kind of step. signals: of ours, by the name of the row (None: GRPO). mean_tokens: None for equal lengths."""

    section: str
    signals: dict[str, str | None]
    groups: int
    new_tokens: int
    trainer: str
    mean_tokens: int | None = None

    @property
    def samples_per_prompt(self) -> int:
        """Answers to a prompt."""
        return SAMPLES // self.groups

    @property
    def answers(self) -> str:
        """What they look like, in words."""
        length = f"{self.new_tokens} tokens"
        if self.mean_tokens is not None:
            length = f"about {self.mean_tokens} tokens, {self.new_tokens} at most"
        return f"{self.groups} x {self.samples_per_prompt} answers of {length}"

    def end_ids(self, vocab_size: int) -> list[int]:
        """The tokens that end an answer: with random weights, each is drawn about equally often."""
        return [] if self.mean_tokens is None else list(range(self.mean_tokens - 1, vocab_size, self.mean_tokens))


MOPD = {"MOPD, sampled": "sampled", "MOPD, full vocabulary": "full"}
CASES = (
    Case("grpo", {"GRPO": None}, groups=16, new_tokens=16, trainer="GRPOTrainer"),
    Case("grpo", {"GRPO": None}, groups=16, new_tokens=64, trainer="GRPOTrainer"),
    Case("grpo", {"GRPO": None}, groups=16, new_tokens=256, trainer="GRPOTrainer", mean_tokens=48),
    Case("mopd", MOPD, groups=64, new_tokens=16, trainer="DistillationTrainer"),
    Case("mopd", MOPD, groups=64, new_tokens=256, trainer="DistillationTrainer", mean_tokens=48),
)


@dataclass(frozen=True)
class Checkpoints:
    """Folders of policies and teachers, and the prompts, as text and as token ids."""

    folder: Path
    config: ModelConfig
    prompts: list[str]
    prompt_ids: list[list[int]]

    def model(self, name: str) -> str:
        """One of mimo, mimo_teacher, qwen2, qwen2_teacher."""
        return str(self.folder / name)

    @classmethod
    def write(cls, folder: Path, num_prompts: int) -> "Checkpoints":
        """Random weights (a teacher differs by its seed), and a tokenizer trained on the prompts."""
        task = open_task(TASK)
        problems = [task.problem_at(index, split="train", seed=0) for index in range(num_prompts)]
        config = tiny()
        tokenizer = Tokenizer.train([problem.prompt for problem in problems], vocab_size=config.vocab_size)
        config = replace(config, vocab_size=tokenizer.vocab_size)
        for seed, suffix in enumerate(("", "_teacher")):
            model = MiMo(config)
            model.initialize(torch.Generator().manual_seed(seed))
            save_model(model, folder / f"mimo{suffix}")
            _save_dense(config, folder / f"qwen2{suffix}", seed)
            for name in ("mimo", "qwen2"):
                tokenizer.save(folder / f"{name}{suffix}")
        ids = [encode_prompt(tokenizer, prompt_messages(problem)) for problem in problems]
        return cls(folder, config, [tokenizer.decode(own, skip_special=False) for own in ids], ids)


def measure(case: Case, checkpoints: Checkpoints, options: argparse.Namespace, remarks: dict[str, None]) -> list[Row]:
    """A row for each signal of ours and each model of the peer."""
    sides: list[Side] = []
    try:
        for name, signal in case.signals.items():
            sides.append(Side(name, "openmimo_rl_peer.py", sys.executable, threads=options.threads))
            sides[-1].call("load", **_our_settings(case, signal, checkpoints, options.threads))
        for model, label in (("mimo", "MiMoV2Flash"), ("qwen2", "dense Qwen2")):
            name = f"TRL {case.trainer}, {label}"
            sides.append(Side(name, "trl_peer.py", options.trl, threads=options.threads))
            about = sides[-1].call("load", **_trl_settings(case, model, checkpoints, options.threads))
            remarks[f"{name}: {about['versions']}; {about['notes']}."] = None
        costs = _in_turns(sides, options.rounds)
    finally:
        for side in sides:
            side.close()
    for name, own in costs.items():
        if case.mean_tokens is None and any(cost["new_tokens"] != SAMPLES * case.new_tokens for cost in own):
            raise RuntimeError(f"{name} wrote {own[0]['new_tokens']} tokens, not {SAMPLES * case.new_tokens}")
        print(f"[{time.strftime('%H:%M:%S')}] {name}, {case.answers}: {_spread(own)}", flush=True)
    peers = [name for name in costs if name not in case.signals]
    floors = {
        name: _floor_ms(case, signal, checkpoints, _median(costs[name], "new_tokens") / SAMPLES, options.flops)
        for name, signal in case.signals.items()
    }
    return [_row(case, name, peer, costs, floors[name]) for name in case.signals for peer in peers]


def main(arguments: list[str] | None = None) -> None:
    """Runs the cases, prints a table, and writes the results unless --quick or --no-write."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.quick:
        options.rounds = 1
    options.flops = max(measured_matmul_flops(CPU, torch.float32) for _ in range(5))  # other load slows some
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints.write(Path(folder), num_prompts=64 * (options.rounds + 2))
        lengths = {len(ids) for ids in checkpoints.prompt_ids}
        remarks = {
            f"Prompts of {', '.join(map(str, sorted(lengths)))} tokens; {options.rounds} rounds; large products at "
            f"{options.flops / 1e9:.0f} GFLOP/s.": None
        }
        for case in CASES:
            if case.section in options.sections:
                rows += measure(case, checkpoints, options, remarks)
    load = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    remarks[f"Other work shared the cores: load averages {load} at the end, on {os.cpu_count()} cores."] = None
    print_rows(rows)
    print(*remarks, sep="\n")
    if not options.quick and not options.no_write:
        print(f"wrote {write_rows('bench_rl', rows, device=CPU, threads=options.threads, remarks=tuple(remarks))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_rl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = list(dict.fromkeys(case.section for case in CASES))
    parser.add_argument("--trl", metavar="PYTHON", required=True, help="interpreter with trl (see above)")
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections, help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each side (default: 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed steps of each side (default: {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="one round; nothing is written")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    return parser


def _our_settings(case: Case, signal: str | None, checkpoints: Checkpoints, threads: int) -> dict:
    return {
        "folder": checkpoints.model("mimo"), "run_folder": _new_folder(checkpoints), "threads": threads,
        "task": asdict(TASK), "groups": case.groups, "samples_per_prompt": case.samples_per_prompt,
        "new_tokens": case.new_tokens, "end_ids": case.end_ids(checkpoints.config.vocab_size),
        "learning_rate": LEARNING_RATE, "signal": signal,
        "teacher": None if signal is None else checkpoints.model("mimo_teacher"),
    }  # fmt: skip


def _trl_settings(case: Case, model: str, checkpoints: Checkpoints, threads: int) -> dict:
    is_grpo = case.section == "grpo"
    return {
        "folder": checkpoints.model(model), "run_folder": _new_folder(checkpoints), "threads": threads,
        "prompts": checkpoints.prompts, "prompt_ids": checkpoints.prompt_ids, "samples": SAMPLES,
        "samples_per_prompt": case.samples_per_prompt, "new_tokens": case.new_tokens,
        "end_ids": case.end_ids(checkpoints.config.vocab_size), "learning_rate": LEARNING_RATE,
        "teacher": None if is_grpo else checkpoints.model(f"{model}_teacher"),
    }  # fmt: skip


def _new_folder(checkpoints: Checkpoints) -> str:
    return tempfile.mkdtemp(dir=checkpoints.folder)


def _in_turns(sides: list[Side], rounds: int) -> dict[str, Costs]:
    """The costs of every side's steps: after one to warm up, each takes one a round."""
    costs: dict[str, Costs] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            cost = side.call("steps", count=1)
            costs[side.name] += cost if number else []
    return costs


def _floor_ms(
    case: Case, signal: str | None, checkpoints: Checkpoints, answer: float, flops_per_second: float
) -> float:
    """Of our model, for answers of `answer` tokens; the output head reads written tokens alone."""
    config = checkpoints.config
    head = config.hidden_size * config.vocab_size
    body = active_matmul_parameters(config) - head
    passes = 4 + {None: 0, "full": 1, "sampled": 2}[signal]
    tokens = len(checkpoints.prompt_ids[0]) * case.groups / SAMPLES + answer  # a prompt needs computing once
    flops = 2 * passes * SAMPLES * (body * tokens + head * answer)
    return 1e3 * flops / flops_per_second


def _row(case: Case, name: str, peer: str, costs: dict[str, Costs], floor_ms: float) -> Row:
    ours, theirs = costs[name], costs[peer]
    wall, their_wall = (_median(costs, "wall_ms") for costs in (ours, theirs))
    cpu, their_cpu = (_median(costs, "cpu_ms") for costs in (ours, theirs))
    rollout, their_rollout = (_median(costs, "generate_ms") for costs in (ours, theirs))
    written, their_written = (_median(costs, "new_tokens") / SAMPLES for costs in (ours, theirs))
    note = "" if case.mean_tokens is None else f"{written:.0f} and {their_written:.0f} tokens an answer; "
    note += (
        f"{1e3 * SAMPLES / wall:.0f} against {1e3 * SAMPLES / their_wall:.0f} samples/s; rolling out {rollout:.0f} "
        f"against {their_rollout:.0f} ms of it; CPU {cpu:.0f} against {their_cpu:.0f} ms, {their_cpu / cpu:.2f}x"
    )
    return Row(f"{name}: {case.answers}", wall, their_wall, peer, floor_ms, GOAL, note)


def _median(costs: Costs, key: str) -> float:
    return statistics.median(cost[key] for cost in costs)


def _spread(costs: Costs) -> str:
    walls = [cost["wall_ms"] for cost in costs]
    return (
        f"{statistics.median(walls):.0f} ms (least {min(walls):.0f}), rolling out {_median(costs, 'generate_ms'):.0f}, "
        f"CPU {_median(costs, 'cpu_ms'):.0f}"
    )


def _save_dense(config: ModelConfig, folder: Path, seed: int) -> None:
    """A Qwen2 of the same depth and width, its FFN so wide that as many weights as in `config` work on a token."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    D, layers, heads, kv_heads = config.hidden_size, len(config.layers), 4, 2
    attention = 2 * D * D + 2 * D * D * kv_heads // heads
    ffn = (active_matmul_parameters(config) - D * config.vocab_size - layers * attention) // (3 * D * layers)
    dense = Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=D, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=config.max_positions,
        tie_word_embeddings=False, initializer_range=config.init_std,
    )  # fmt: skip
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Qwen2ForCausalLM(dense).save_pretrained(folder)


if __name__ == "__main__":
    main()
