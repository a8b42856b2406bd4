"""Post-training compared with TRL on one CPU: samples per second of whole steps, rollout and update.

    python -m benchmarks.bench_rl --trl PYTHON [--sections grpo mopd] [--threads 1] [--rounds 3] [--quick] [--no-write]

PYTHON is the interpreter of a separate environment with TRL. It does not access a hub. Create it once:

    python3.11 -m venv trl && trl/bin/pip install torch==2.13.0
    trl/bin/pip install trl==1.16.0 accelerate datasets

openmimo runs steps of `openmimo rl` (GRPO) and of `openmimo mopd` with the sampled and the full-vocabulary signal. The
model is the `tiny` preset with random weights and the small vocabulary of a tokenizer trained on the prompts. Sizes are
those of `recipes/tiny_cpu.py`: 128 answers a step to 16 (GRPO) or 64 (distillation) prompts of the `sorting` task.
Answers have 16 tokens; GRPO is also measured with 64. Both are also measured with answers of unequal length: one token
in 48 of the vocabulary ends an answer, so lengths are geometric with a mean of 48, cut at 256.

TRL runs GRPOTrainer and DistillationTrainer (on-policy, reverse KL over the vocabulary, its only signal). It trains the
same checkpoint with transformers' class of the architecture, and a dense Qwen2 with the same number of active weights.
The Qwen2 is easier for TRL: no experts, and fused attention.

Common settings: same prompts and reward, answers of exactly the stated length (no end-of-text is accepted) or of the
same length distribution, temperature 1, float32, one AdamW step with clipping, no reference model, no loss of MTP
heads. TRL processes the whole batch at once, openmimo micro-batches of at most 8,192 tokens (two with answers of 64
tokens, one otherwise). openmimo also records and replays routes and writes its event log, as in every run. Answers of
equal length favor TRL, which otherwise generates until the longest of 128 answers ends and trains on a padded batch.

Each side runs in its own process, and sides alternate within a round. A row shows medians of wall time over the rounds;
its note shows CPU time, which other load affects less. The floor is the time of all weight products of a step at the
measured rate of large products: one pass for the rollout, three for the update, one for a teacher, and one more of the
policy for the sampled signal.

Predictions before any measurement: At this size the cost of a step is the number of calls and not arithmetic. It was
known that a decoding step at batch 8 takes openmimo 12 ms and transformers 27 ms. At 128 answers this gives 35 against
80 ms. Then rolling out 16 tokens takes 0.7 against 1.4 s, and the update (5,000 tokens forward and backward) 0.7
against 1.2 s. GRPO is 1.9 times as fast, and 2.1 times with 64 tokens, where decoding is a larger part. Distillation
adds a pass of the teacher to both sides, and another of the policy to the sampled signal: 1.7 and 1.8 times. The dense
Qwen2 has a third of the calls, so openmimo is no faster: 0.8 times. This would miss the goal of 5 times.

Prediction for answers of unequal length, before their first run and after the steps above were measured at 0.7 to 0.9
times: TRL trains on 128 x 297 positions, openmimo on 128 x 48 and 16 prompts of 41, which is a sixth. Both decode for
256 steps, openmimo with 48 instead of 128 rows on average, where a row costs as much as the calls of a step. GRPO is 3
to 4 times as fast, distillation 2.5 to 3.5 times.
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
    """One kind of step.

    Attributes:
        section: Value of `--sections` that selects it.
        signals: Distillation signal of openmimo by row name (None: GRPO).
        groups: Prompts per step.
        new_tokens: Length of answers, or maximum length if `mean_tokens` is set.
        trainer: Trainer class of TRL.
        mean_tokens: Mean length of answers (None: all have `new_tokens`).
    """

    section: str
    signals: dict[str, str | None]
    groups: int
    new_tokens: int
    trainer: str
    mean_tokens: int | None = None

    @property
    def samples_per_prompt(self) -> int:
        """Answers per prompt."""
        return SAMPLES // self.groups

    @property
    def answers(self) -> str:
        """Description of the answers, for row names."""
        length = f"{self.new_tokens} tokens"
        if self.mean_tokens is not None:
            length = f"about {self.mean_tokens} tokens, {self.new_tokens} at most"
        return f"{self.groups} x {self.samples_per_prompt} answers of {length}"

    def end_ids(self, vocab_size: int) -> list[int]:
        """Tokens that end an answer. With random weights, all tokens are about equally likely."""
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
    """Folders of policies and teachers, and the prompts as text and token ids."""

    folder: Path
    config: ModelConfig
    prompts: list[str]
    prompt_ids: list[list[int]]

    def model(self, name: str) -> str:
        """Returns the folder of a model: mimo, mimo_teacher, qwen2 or qwen2_teacher."""
        return str(self.folder / name)

    @classmethod
    def write(cls, folder: Path, num_prompts: int) -> "Checkpoints":
        """Writes models with random weights (teachers have another seed) and a tokenizer trained on the prompts."""
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
    """Measures a case. Returns a row for each signal of openmimo and each model of TRL."""
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
            raise RuntimeError(f"{name} generated {own[0]['new_tokens']} tokens, not {SAMPLES * case.new_tokens}")
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
    options.flops = max(measured_matmul_flops(CPU, torch.float32) for _ in range(5))  # other load slows some of them
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
    remarks[f"Load averages at the end: {load}, on {os.cpu_count()} cores."] = None
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
    parser.add_argument("--quick", action="store_true", help="one round, write no results")
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
    """Returns the costs of the steps of each side. Each side runs a warm-up step, then one step per round."""
    costs: dict[str, Costs] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            cost = side.call("steps", count=1)
            costs[side.name] += cost if number else []
    return costs


def _floor_ms(
    case: Case, signal: str | None, checkpoints: Checkpoints, answer: float, flops_per_second: float
) -> float:
    """Returns the floor for answers of `answer` tokens. The output head processes only sampled tokens."""
    config = checkpoints.config
    head = config.hidden_size * config.vocab_size
    body = active_matmul_parameters(config) - head
    passes = 4 + {None: 0, "full": 1, "sampled": 2}[signal]
    tokens = len(checkpoints.prompt_ids[0]) * case.groups / SAMPLES + answer  # each prompt is computed once
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
    """Saves a random Qwen2 with the depth, width and number of active weights of `config`."""
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
