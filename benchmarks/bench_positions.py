"""Train short, test long: methods of context extension on copying over growing distances.

    python -m benchmarks.bench_positions [--steps 300] [--seeds 1]

A model of 0.1 million parameters (a sliding layer, then a full one) learns to copy: rows of 128 tokens repeat a random
segment of 8 to 64 tokens. The table shows the share of right tokens in the second period, by the distance between the
two periods, up to 1,024 tokens. RoPE is trained once per seed and then tested with each method without more training;
NoPE and ALiBi in the full layer are trained from scratch. The last row group is the RoPE model after a short extension
at 512 tokens (a tenth of the steps) with each method.
"""

import argparse
import copy
import statistics
from dataclasses import replace

import torch
from torch.nn import functional

from openmimo.model.config import AttentionConfig, LayerConfig, ModelConfig, RopeScaling
from openmimo.model.context import PackedContext
from openmimo.model.mimo import MiMo

VOCAB, TRAINED, EXTENDED, ROWS = 64, 128, 512, 32
DISTANCES = (32, 64, 128, 256, 512, 1024)
THETA, FACTOR = 1e4, 8.0
METHODS: dict[str, tuple[float, RopeScaling | None]] = {
    "unchanged": (THETA, None),
    "base x 8": (8 * THETA, None),
    "base x 64": (64 * THETA, None),
    "interpolation": (THETA, RopeScaling("linear", FACTOR)),
    "NTK-aware": (THETA, RopeScaling("ntk", FACTOR)),
    "YaRN": (THETA, RopeScaling("yarn", FACTOR, TRAINED)),
}


def model_of(kind: str) -> MiMo:
    """A model whose full layer has RoPE ("rope"), no positions ("nope") or linear biases ("alibi")."""
    full = AttentionConfig(
        "full", num_heads=4, num_kv_heads=2, key_dim=24, value_dim=16, rotary_dim=16, rope_theta=THETA
    )
    sliding = replace(full, kind="sliding", window_keys=8, sink=True)
    if kind != "rope":
        full = replace(full, kind="alibi" if kind == "alibi" else "full", rotary_dim=0)
    layers = (LayerConfig(sliding, "dense"), LayerConfig(full, "dense"))
    return MiMo(
        ModelConfig(
            vocab_size=VOCAB, hidden_size=64, dense_ffn_dim=128, layers=layers, init_std=0.08,
            max_positions=4 * max(DISTANCES),
        )
    )  # fmt: skip


def repeats(generator: torch.Generator, length: int, longest: int) -> tuple[torch.Tensor, int]:
    """A random segment of 8 to `longest` tokens, repeated to `length` tokens, and its period."""
    period = int(torch.randint(8, longest + 1, (1,), generator=generator))
    segment = torch.randint(0, VOCAB, (period,), generator=generator)
    return segment.repeat(-(-length // period))[:length], period


def train(model: MiMo, *, steps: int, length: int, rate: float, seed: int) -> None:
    """Train to copy in rows of `length` tokens; only tokens after the first period enter the loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    rows = ROWS * TRAINED // length
    for step in range(steps):
        drawn = [repeats(generator, length, length // 2) for _ in range(rows)]
        tokens_T = torch.cat([tokens for tokens, _ in drawn])
        is_known_T = torch.cat([torch.arange(1, length + 1) >= period for _, period in drawn])
        is_known_T[length - 1 :: length] = False  # the last token of a row has no target
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 1.0) * (1.0 - 0.9 * step / steps)
        states_TD = model(tokens_T, PackedContext((length,) * rows)).post_norm_TD
        logits = model.head(states_TD[is_known_T])
        loss = functional.cross_entropy(logits, tokens_T.roll(-1)[is_known_T])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: MiMo, distance: int, rows: int = 8) -> float:
    """The share of right tokens in the second period of rows of two periods."""
    generator = torch.Generator().manual_seed(distance)
    segments = torch.randint(0, VOCAB, (rows, distance), generator=generator)
    tokens_T = segments.repeat(1, 2).flatten()
    states_TD = model(tokens_T, PackedContext((2 * distance,) * rows)).post_norm_TD
    guessed = model.head(states_TD).argmax(-1).view(rows, 2 * distance)
    skipped = 4  # the first tokens of a period follow a context that the model has not seen
    return (guessed[:, distance + skipped - 1 : -1] == segments[:, skipped:]).double().mean().item()


def extended(model: MiMo, method: str) -> MiMo:
    """A copy of a trained model with the positions of a method."""
    theta, scaling = METHODS[method]
    result = copy.deepcopy(model)
    result.extend_context(full_rope_theta=theta, full_rope_scaling=scaling, max_positions=4 * max(DISTANCES))
    return result


def measure(steps: int, seed: int) -> dict[str, list[float]]:
    """The accuracy of each method at each distance."""
    found: dict[str, list[float]] = {}
    trained = {}
    for kind in ("rope", "nope", "alibi"):
        print(f"training {kind}, seed {seed}", flush=True)
        model = model_of(kind)
        model.initialize(torch.Generator().manual_seed(seed))
        train(model, steps=steps, length=TRAINED, rate=5e-3, seed=seed)
        trained[kind] = model
    for method in METHODS:
        found[f"RoPE, {method}"] = [accuracy(extended(trained["rope"], method), one) for one in DISTANCES]
    for kind in ("nope", "alibi"):
        found[kind] = [accuracy(trained[kind], one) for one in DISTANCES]
    for method in METHODS:
        print(f"extending with {method}, seed {seed}", flush=True)
        model = extended(trained["rope"], method)
        train(model, steps=steps // 10, length=EXTENDED, rate=1e-3, seed=seed + 1000)
        found[f"extended, {method}"] = [accuracy(model, one) for one in DISTANCES]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in range(options.seeds):
        results.append(measure(options.steps, seed))
        print_table(results)


def print_table(results: list[dict[str, list[float]]]) -> None:
    """Print the means of the seeds so far, with the lowest and the highest."""
    print("method | " + " | ".join(map(str, DISTANCES)))
    for name in results[0]:
        columns = zip(*(result[name] for result in results), strict=True)
        cells = [f"{100 * statistics.mean(values):.0f} ({min(values):.2f}-{max(values):.2f})" for values in columns]
        print(f"{name} | " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
