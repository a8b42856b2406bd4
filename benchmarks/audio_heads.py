"""Delayed against parallel codebooks, and loss weights 12-8-6-4-2-2-1-1 against equal ones, trained on a CPU.

    python -m benchmarks.audio_heads [--arms delayed,parallel,equal] [--seeds 3] [--steps 300] [--codes FILE]

A model speaks rows of three words. A word is a path of eight frames in eight dims. A row adds an offset, the "voice",
and noise that depends on that of the frame before. A residual quantizer of eight codebooks of 32 entries (k-means)
turns frames to codes. The text is given in the prompt, and the loss is that of the codes and of the text channel.

    delayed   codebook q of a frame is predicted q steps later, given the codebooks before it; weights 12-8-...
    parallel  all codebooks of a frame are predicted at once; weights 12-8-...
    equal     delayed, all codebooks with weight 4.5 (the mean of 12-8-...)

Measured on held-out rows: nats of the codes of a frame. Measured on generated speech: the share of words
whose path is the nearest one, and the squared distance to the path after the voice is taken away, where 1 is that of
the data. A seed sets the words, the data, the weights and the draws; arms of one seed share the data.

With --codes, the model continues real speech instead: FILE is the `codes.safetensors` in the `codes` folder of a run of
`openmimo audio language`. Rows are pieces of 32 frames, and every tenth clip is held out. Measured on generated speech:
the share of pairs of codes, of neighboring codebooks in a frame, that occur in the training codes.

Prediction before the first run: delayed codebooks need fewer nats and have a lower distance, because the codebooks of a
frame depend on each other. Falling weights lower the nats of the first codebooks and raise those of the last ones, and
the words are not worse.
"""

import argparse
import itertools
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file

from openmimo.core.metrics import bootstrap_interval
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.audio.cache import BackboneCache
from openmimo.kernels.operations import draw_tokens
from openmimo.model.attention import AttentionConfig
from openmimo.model.audio.context import StepContext
from openmimo.model.audio.language import AudioLanguageModel
from openmimo.model.audio.language_config import AudioModelConfig, LocalConfig, with_audio
from openmimo.model.audio.sequence import (
    ALL_SPECIAL_TOKENS,
    AudioPart,
    AudioSequence,
    SequenceBuilder,
    TextPart,
    packed,
)
from openmimo.model.config import LayerConfig, ModelConfig
from openmimo.model.context import PackedContext
from openmimo.train.audio.loss import LossWeights, audio_loss, targets
from openmimo.train.optim import warmed_cosine

CODEBOOKS, ENTRIES, DIMS, FRAMES, WORDS, SPOKEN = 8, 32, 8, 8, 10, 3
FALLING = (12.0, 8.0, 6.0, 4.0, 2.0, 2.0, 1.0, 1.0)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BATCH, PEAK, HELD_OUT, GENERATED, PIECE = 12, 3e-3, 96, 32, 32
ARMS = {"delayed": (False, FALLING), "parallel": (True, FALLING), "equal": (False, (4.5,) * CODEBOOKS)}


class Source(Protocol):
    """The data of a seed."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each codebook."""
        ...

    def document(self, builder: SequenceBuilder, generator: torch.Generator, *, held_out: bool) -> AudioSequence:
        """Return a row; its audio is predicted."""
        ...

    def listened(self, model: AudioLanguageModel, builder: SequenceBuilder, generator: torch.Generator) -> dict:
        """Return the measurements of generated speech."""
        ...


@dataclass(frozen=True)
class World:
    """The words of a seed and the quantizer of their frames.

    Attributes:
        paths_WFD: The path of each word.
        codebooks: Entries [32, D] of each codebook.
    """

    paths_WFD: torch.Tensor
    codebooks: list[torch.Tensor]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """As `Source.codebook_sizes`."""
        return (ENTRIES,) * CODEBOOKS

    def document(self, builder: SequenceBuilder, generator: torch.Generator, *, held_out: bool) -> AudioSequence:
        """As `Source.document`: the text of a row and its audio."""
        words = draw_words(generator)
        codes_FQ = self.encode(spoken(self.paths_WFD, words, generator))
        return builder.build([prompt(words), AudioPart(codes_FQ, has_loss=True)])

    def listened(self, model: AudioLanguageModel, builder: SequenceBuilder, generator: torch.Generator) -> dict:
        """As `Source.listened`: words heard, and the distance to their paths."""
        rows = [draw_words(generator) for _ in range(GENERATED)]
        real = [self.decode(self.encode(spoken(self.paths_WFD, words, generator))) for words in rows]
        starts = [[builder.build([prompt(words)]), builder.text([builder.tokens.start])] for words in rows]
        made = [self.decode(generate(model, builder, start, SPOKEN * FRAMES, generator)) for start in starts]
        base = statistics.fmean(distance(self, words, x_FD) for words, x_FD in zip(rows, real, strict=True))
        far = statistics.fmean(distance(self, words, x_FD) for words, x_FD in zip(rows, made, strict=True))
        words = statistics.fmean(heard(self, words, x_FD) for words, x_FD in zip(rows, made, strict=True))
        return {"words": words, "distance": far / base}

    def encode(self, x_FD: torch.Tensor) -> torch.Tensor:
        """Return the codes [F, Q] of frames."""
        codes, rest = [], x_FD
        for entries in self.codebooks:
            codes.append(torch.cdist(rest, entries).argmin(dim=1))
            rest = rest - entries[codes[-1]]
        return torch.stack(codes, dim=1)

    def decode(self, codes_FQ: torch.Tensor) -> torch.Tensor:
        """Return the frames [F, D] of codes."""
        return torch.stack([entries[codes_FQ[:, q]] for q, entries in enumerate(self.codebooks)]).sum(dim=0)


class Recorded:
    """Codes of real speech.

    Args:
        clips: The codes [F, 8] of each clip.
    """

    def __init__(self, clips: list[torch.Tensor]):
        clips = [clip.long() for clip in clips if len(clip) >= PIECE]
        self._held_out, self._train = clips[::10], [clip for number, clip in enumerate(clips) if number % 10]
        self.codebook_sizes = tuple((torch.cat(clips).amax(dim=0) + 1).tolist())
        self._seen = [torch.zeros(sizes, dtype=torch.bool) for sizes in itertools.pairwise(self.codebook_sizes)]
        for clip in self._train:
            for number, seen in enumerate(self._seen):
                seen[clip[:, number], clip[:, number + 1]] = True

    def document(self, builder: SequenceBuilder, generator: torch.Generator, *, held_out: bool) -> AudioSequence:
        """As `Source.document`: a piece of a clip."""
        return builder.build([AudioPart(self._piece(generator, held_out=held_out), has_loss=True)])

    def listened(self, model: AudioLanguageModel, builder: SequenceBuilder, generator: torch.Generator) -> dict:
        """As `Source.listened`: the share of known pairs in the second half of pieces, of which the first is given."""
        made, real = [], []
        for _ in range(GENERATED):
            piece_FQ = self._piece(generator, held_out=True)
            given = builder.patches(builder.patches_of(piece_FQ[: PIECE // 2]))
            start = [builder.text([builder.tokens.start]), given]
            made.append(generate(model, builder, start, PIECE // 2, generator))
            real.append(piece_FQ[PIECE // 2 :])
        return {"pairs": self._known(torch.cat(made)), "pairs of the data": self._known(torch.cat(real))}

    def _known(self, codes_FQ: torch.Tensor) -> float:
        shares = [seen[codes_FQ[:, q], codes_FQ[:, q + 1]].float().mean() for q, seen in enumerate(self._seen)]
        return float(torch.stack(shares).mean())

    def _piece(self, generator: torch.Generator, *, held_out: bool) -> torch.Tensor:
        clips = self._held_out if held_out else self._train
        clip = clips[int(torch.randint(len(clips), (), generator=generator))]
        first = int(torch.randint(len(clip) - PIECE + 1, (), generator=generator))
        return clip[first : first + PIECE]


def spoken(paths_WFD: torch.Tensor, words: list[int], generator: torch.Generator) -> torch.Tensor:
    """Return the frames of a row of words in one voice."""
    clean_FD = torch.cat([paths_WFD[word] for word in words])
    voice_D = 0.7 * torch.randn(DIMS, generator=generator)
    draws_FD = 0.25 * torch.randn(clean_FD.shape, generator=generator)
    noise = [draws_FD[0]]
    for draw_D in draws_FD[1:]:
        noise.append(0.7 * noise[-1] + draw_D)
    return clean_FD + voice_D + torch.stack(noise)


def draw_words(generator: torch.Generator) -> list[int]:
    """Return the words of a row."""
    return torch.randint(0, WORDS, (SPOKEN,), generator=generator).tolist()


def make_world(generator: torch.Generator) -> World:
    """Draw the words, and fit the codebooks to the residuals of 300 rows, ten iterations of k-means each."""
    knots_WKD = torch.randn(WORDS, 3, DIMS, generator=generator)
    paths_WFD = torch.nn.functional.interpolate(
        knots_WKD.transpose(1, 2), size=FRAMES, mode="linear", align_corners=True
    ).transpose(1, 2)
    rest = torch.cat([spoken(paths_WFD, draw_words(generator), generator) for _ in range(300)])
    codebooks = []
    for _ in range(CODEBOOKS):
        entries = rest[torch.randperm(len(rest), generator=generator)[:ENTRIES]].clone()
        for _ in range(10):
            nearest = torch.cdist(rest, entries).argmin(dim=1)
            for entry in range(ENTRIES):
                if (nearest == entry).any():
                    entries[entry] = rest[nearest == entry].mean(dim=0)
        codebooks.append(entries)
        rest = rest - entries[torch.cdist(rest, entries).argmin(dim=1)]
    return World(paths_WFD, codebooks)


def model_config(codebook_sizes: tuple[int, ...], *, parallel: bool) -> AudioModelConfig:
    """Return a model of 0.3 million parameters."""
    full = AttentionConfig("full", num_heads=4, num_kv_heads=2, key_dim=16, value_dim=16, rotary_dim=16, rope_theta=1e4)
    backbone = ModelConfig(
        vocab_size=320, hidden_size=64, dense_ffn_dim=160, layers=(LayerConfig(full, "dense"),) * 3,
        attention_bias=True, init_std=0.06, max_positions=256, family="mimo", norm_epsilon=1e-6,
    )  # fmt: skip
    local = LocalConfig(dim=64, num_layers=1, num_heads=4, ffn_dim=256)
    return with_audio(
        backbone,
        codebook_sizes=codebook_sizes,
        encoder=local,
        decoder=replace(local, num_layers=2),
        parallel_heads=parallel,
        local_rope_theta=1e4,
    )


def prompt(words: list[int]) -> TextPart:
    """Return the text of a row."""
    return TextPart("".join(f" {NAMES[word]}" for word in words))


def run(arm: str, seed: int, steps: int, tokenizer: Tokenizer, recorded: Recorded | None) -> dict:
    """Train one arm; returns its measurements."""
    parallel, codebook_weights = ARMS[arm]
    generator = torch.Generator().manual_seed(seed)
    source: Source = recorded or make_world(generator)
    config = model_config(source.codebook_sizes, parallel=parallel)
    builder = SequenceBuilder(tokenizer, config)
    model = AudioLanguageModel(config)
    model.initialize(torch.Generator().manual_seed(seed))
    weights = LossWeights(100.0, codebook_weights, 0.01)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = warmed_cosine(step, steps=steps, peak=PEAK, end=PEAK / 10, warmup_steps=20)
        batch = packed([source.document(builder, generator, held_out=False) for _ in range(BATCH)])
        predicted = targets(batch, weights)
        context = PackedContext(batch.document_lengths)
        loss, _ = audio_loss(model, batch, predicted, context, weights, predicted.counts())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return measured(model.eval(), builder, source, seed)


@torch.no_grad()
def measured(model: AudioLanguageModel, builder: SequenceBuilder, source: Source, seed: int) -> dict:
    """Return the measurements of a trained model; the rows depend on the seed only."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    batch = packed([source.document(builder, generator, held_out=True) for _ in range(HELD_OUT)])
    weights = LossWeights(1.0, (1.0,) * CODEBOOKS, 0.0)
    predicted = targets(batch, weights)
    context = PackedContext(batch.document_lengths)
    _, shares = audio_loss(model, batch, predicted, context, weights, predicted.counts())
    nats = shares[1:].tolist()
    return {
        "nats": sum(nats),
        "nats of codebooks 0-1": sum(nats[:2]),
        "nats of codebooks 4-7": sum(nats[4:]),
        **source.listened(model, builder, generator),
    }


def generate(
    model: AudioLanguageModel,
    builder: SequenceBuilder,
    start: list[AudioSequence],
    num_frames: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the codes [F, Q] that follow a start, at temperature 1."""
    numbers_51 = torch.tensor([1.0, 2.0, torch.inf, 0.0, 1.0], dtype=torch.float64)[:, None]

    def choose(logits_V: torch.Tensor, codebook: int, frame: int) -> int:
        uniform_1 = torch.rand(1, generator=generator, dtype=torch.float64)
        return int(draw_tokens(logits_V[None], numbers_51, uniform_1, has_filters=False))

    steps, cache, patches = StepContext(model.audio.local_steps), BackboneCache(model, 256), []
    state_D = cache.run(model.embed(packed(start)))[-1]
    for _ in range(num_frames // model.audio.patch_frames):
        patches.append(model.generate_patch(state_D, steps, choose))
        state_D = cache.run(model.embed(builder.patches(patches[-1][None])))[-1]
    return torch.cat(patches)


def distance(world: World, words: list[int], x_FD: torch.Tensor) -> float:
    """Return the mean squared distance to the path of the words, without the mean of the row."""
    rest_FD = x_FD - torch.cat([world.paths_WFD[word] for word in words])
    return float((rest_FD - rest_FD.mean(dim=0)).pow(2).mean())


def heard(world: World, words: list[int], x_FD: torch.Tensor) -> float:
    """Return the share of the words whose path is the nearest one after the voice is taken away."""
    voice_D = (x_FD - torch.cat([world.paths_WFD[word] for word in words])).mean(dim=0)
    hits = 0
    for word, part_FD in zip(words, (x_FD - voice_D).split(FRAMES), strict=True):
        hits += int((world.paths_WFD - part_FD).pow(2).mean(dim=(1, 2)).argmin()) == word
    return hits / len(words)


def main() -> None:
    """Run the arms and print a table, and the differences from `delayed` by seed with bootstrap intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="delayed,parallel,equal")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--codes", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recorded = Recorded(list(load_file(options.codes).values())) if options.codes else None
    tokenizer = Tokenizer.train([" ".join(NAMES)] * 50, 320, ALL_SPECIAL_TOKENS)
    rows = []
    for seed in range(options.seeds):
        for arm in options.arms.split(","):
            start = time.perf_counter()
            rows.append({"arm": arm, "seed": seed, **run(arm, seed, options.steps, tokenizer, recorded)})
            print(json.dumps(rows[-1]), f"{time.perf_counter() - start:.0f} s", flush=True)
            if options.out:
                options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_table(rows)


def print_table(rows: list[dict]) -> None:
    """Print mean and spread of each arm, and the mean difference from `delayed` with a 95 % bootstrap interval."""
    arms = dict.fromkeys(row["arm"] for row in rows)
    for name in (name for name in rows[0] if name not in ("arm", "seed")):
        by_arm = {arm: [row[name] for row in rows if row["arm"] == arm] for arm in arms}
        for arm, values in by_arm.items():
            line = f"{name:24} {arm:9} {statistics.fmean(values):8.3f}  ({min(values):.3f} to {max(values):.3f})"
            if arm != "delayed" and "delayed" in by_arm and len(by_arm["delayed"]) == len(values):
                differences = [value - other for value, other in zip(values, by_arm["delayed"], strict=True)]
                low, high = bootstrap_interval(differences)
                line += f"  minus delayed {statistics.fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"
            print(line)


if __name__ == "__main__":
    main()
