"""Full, hybrid sliding and HySparse models of equal size on a recall task of two hops, trained on a CPU.

    python -m benchmarks.hysparse_hops [--arms full,sliding,sparse,sparse_token] [--seeds 3] [--steps 4000] [--far]

A context has four blocks of 8 tokens. A block has four pairs of two chains: key -> tag and tag -> value. After the
context, queries ask for the tag of a key (one hop) or for its value (two hops). All models have three layers: a sliding
one, a full one, and one of the arm's kind. The full layer finds the tag of a key, and only a later layer that reads far
keys can find the value of the tag. With --far, the two pairs of a chain are in different blocks. The first half of the
steps has contexts of one block, then two, and three.

Prediction before the first run: full and sparse models learn both questions where the pairs of a chain share a block,
and sliding models only the first. With --far, sparse models fall behind full ones, because the blocks are chosen for
the first hop.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from openmimo.kernels.attention import AttentionOut
from openmimo.model.attention import AttentionConfig
from openmimo.model.config import LayerConfig, ModelConfig
from openmimo.model.context import AttentionCall, PackedContext
from openmimo.model.mimo import MiMo
from openmimo.model.sparse_attention import choose_blocks

BLOCK, CHAINS, NUM_BLOCKS, QUERIES, WINDOW, SELECTED = 8, 2, 4, 8, 3, 16
WORDS = 12  # of keys, of tags and of values
ONE, TWO = 3 * WORDS, 3 * WORDS + 1
LENGTH = BLOCK * NUM_BLOCKS + 3 * QUERIES
ARMS = ("full", "sliding", "sparse", "sparse_token")


def model_config(arm: str) -> ModelConfig:
    """Three layers of 64 dims; the last is of the kind of the arm."""
    size = 1 if arm == "sparse_token" else BLOCK
    full = AttentionConfig(
        "full", num_heads=4, num_kv_heads=2, key_dim=32, value_dim=32, rotary_dim=16, rope_theta=10_000.0
    )
    sliding = replace(full, kind="sliding", window_keys=WINDOW, sink=True)
    sparse = replace(sliding, kind="sparse", kv_from=1, score_block=size, selected_keys=SELECTED, gate="head")
    later = {"full": full, "sliding": sliding}.get(arm, sparse)
    source = replace(full, score_block=size) if later is sparse else full
    return ModelConfig(
        vocab_size=3 * WORDS + 2,
        hidden_size=64,
        dense_ffn_dim=128,
        layers=tuple(LayerConfig(spec, "dense") for spec in (sliding, source, later)),
        init_std=0.06,
        tie_embeddings=True,
        max_positions=LENGTH,
    )


def draw_batch(
    batch: int, *, far: bool, generator: torch.Generator, num_blocks: int = NUM_BLOCKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids of `batch` equal texts, and labels: the answer after each asked key, -1 elsewhere."""
    chains = CHAINS * num_blocks

    def shuffled(count: int, size: int) -> torch.Tensor:
        return torch.rand(batch, size, generator=generator).argsort(1)[:, :count]

    keys, tags, values = (shuffled(chains, WORDS) + first for first in (0, WORDS, 2 * WORDS))
    first, second = torch.stack([keys, tags], 2), torch.stack([tags, values], 2)
    if far:
        second = second.roll(CHAINS * (num_blocks // 2), 1)
    pairs = torch.cat([x.view(batch, num_blocks, CHAINS, 2) for x in (first, second)], 2)
    order = torch.rand(batch, num_blocks, 2 * CHAINS, generator=generator).argsort(2)
    context = pairs.gather(2, order[..., None].expand(-1, -1, -1, 2)).flatten(1)
    asked = torch.randint(chains, (batch, QUERIES), generator=generator)
    is_two = torch.rand(batch, QUERIES, generator=generator) < 0.5
    answers = torch.where(is_two, values.gather(1, asked), tags.gather(1, asked))
    questions = torch.stack([torch.where(is_two, TWO, ONE), keys.gather(1, asked), answers], 2).flatten(1)
    tokens = torch.cat([context, questions], 1)
    labels = torch.full_like(tokens, -1)
    labels[:, BLOCK * num_blocks + 1 :: 3] = answers
    return tokens.flatten(), labels.flatten()


def train(arm: str, seed: int, *, steps: int, far: bool, batch: int = 32) -> tuple[MiMo, list[dict[str, float]]]:
    """Train one model; return it and its accuracy every tenth of the steps."""
    torch.manual_seed(seed)
    model = MiMo(model_config(arm))
    generator = torch.Generator().manual_seed(1000 + seed)
    model.initialize(generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    history: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(step / 50, 1.0, (steps - step + 1) / (0.3 * steps))
        num_blocks = min(1 + step * 2 * (NUM_BLOCKS - 1) // steps, NUM_BLOCKS)
        tokens, labels = draw_batch(batch, far=far, generator=generator, num_blocks=num_blocks)
        context = PackedContext((len(tokens) // batch,) * batch)
        logits = model.head(model(tokens, context).post_norm_TD[labels >= 0])
        loss = F.cross_entropy(logits, labels[labels >= 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(steps // 10, 1) == 0:
            history.append({"step": step, "loss": loss.item(), **accuracy(model, far=far)})
            print(arm, seed, {name: round(value, 3) for name, value in history[-1].items()}, flush=True)
    return model, history


@torch.no_grad()
def accuracy(model: MiMo, *, far: bool, batch: int = 32) -> dict[str, float]:
    """Measure the share of right answers to questions of one and of two hops on a fixed set."""
    tokens, labels = draw_batch(batch, far=far, generator=torch.Generator().manual_seed(7))
    found = model.head(model(tokens, PackedContext((LENGTH,) * batch)).post_norm_TD).argmax(1)
    is_two = torch.cat([tokens[:1], tokens[:-1]]) == TWO
    return {
        name: (found == labels)[(labels >= 0) & rows].float().mean().item()
        for name, rows in (("one_hop", ~is_two), ("two_hops", is_two))
    }


class _Recording(PackedContext):
    """Keeps the calls that read chosen blocks."""

    def attend(self, call: AttentionCall) -> AttentionOut:
        """As `PackedContext.attend`."""
        if call.blocks is not None:
            self.__dict__.setdefault("calls", []).append(call)
        return super().attend(call)


@torch.no_grad()
def captured_mass(model: MiMo, *, far: bool) -> dict[str, float]:
    """Measure the attention mass of the sparse layers' queries, over all keys of the source, in different blocks.

    Queries are those after the context. Each selection has equally many blocks: those of the full layer, the best for
    each query and key/value head, random ones, the newest ones, and those whose mean key has the largest logit.
    """
    tokens, _ = draw_batch(1, far=far, generator=torch.Generator().manual_seed(8))
    context = _Recording((LENGTH,))
    model(tokens, context)
    size = model.config.layers[1].attention.score_block
    assert size is not None
    rows = slice(BLOCK * NUM_BLOCKS, LENGTH)
    masses: dict[str, list[float]] = {}
    for call in context.__dict__["calls"]:
        k_SGK = context._sources[1][0]
        q_TGRK = call.q_TNK.unflatten(1, (k_SGK.shape[1], -1))
        logits = torch.einsum("tgrk,sgk->tgrs", q_TGRK, k_SGK) * k_SGK.shape[2] ** -0.5
        hidden_TS = torch.arange(LENGTH)[:, None] < torch.arange(LENGTH)
        probabilities = logits.masked_fill(hidden_TS[:, None, None], float("-inf")).softmax(-1)
        mass_TGC = F.pad(probabilities.mean(2), (0, -LENGTH % size)).unflatten(2, (-1, size)).sum(-1)
        means_CGK = F.pad(k_SGK, (0, 0, 0, 0, 0, -LENGTH % size)).unflatten(0, (-1, size)).mean(1)
        by_mean = torch.einsum("tgrk,cgk->tgrc", q_TGRK, means_CGK).amax(2)
        newest = torch.arange(mass_TGC.shape[2], dtype=torch.float32).expand_as(mass_TGC)
        scores = {
            "best": mass_TGC,
            "random": torch.rand(mass_TGC.shape, generator=torch.Generator().manual_seed(9)),
            "local": newest,
            "mean_key": by_mean - by_mean.min() + 1,
        }
        chosen = {
            name: choose_blocks(x, torch.arange(LENGTH), size=size, count=SELECTED // size).ids_TGJ
            for name, x in scores.items()
        }
        for name, ids in {"reused": call.blocks.ids_TGJ, **chosen}.items():
            kept = mass_TGC.gather(2, ids.clamp(min=0)) * (ids >= 0)
            masses.setdefault(name, []).append(kept.sum(-1)[rows].mean().item())
    return {name: statistics.mean(values) for name, values in masses.items()}


def main() -> None:
    """Train all arms with all seeds, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--far", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        for arm in options.arms.split(","):
            start = time.perf_counter()
            model, history = train(arm, seed, steps=options.steps, far=options.far)
            result = {
                "arm": arm,
                "seed": seed,
                "far": options.far,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "seconds": time.perf_counter() - start,
                "history": history,
            }
            if arm.startswith("sparse"):
                result["mass"] = captured_mass(model, far=options.far)
            results.append(result)
            print({name: value for name, value in result.items() if name != "history"}, flush=True)
            if options.output:
                options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
