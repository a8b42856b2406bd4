"""Decoding compared with transformers, and speculative with plain decoding. `bench_cpu --only decode` runs both."""

import tempfile
import warnings
from dataclasses import dataclass, replace

import torch

from benchmarks.harness import median_milliseconds
from openmimo.core.records import SamplingParams
from openmimo.engine.llm import LLM
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import tiny


@dataclass(frozen=True)
class DecodeRow:
    """Decoding at one batch size.

    Attributes:
        batch_size: Sequences.
        openmimo_tokens_per_second: New tokens per second, median over the rounds.
        transformers_tokens_per_second: New tokens per second of transformers.
        ratio: Time of transformers divided by that of openmimo.
        same_tokens: Whether both generated the same tokens.
    """

    batch_size: int
    openmimo_tokens_per_second: float
    transformers_tokens_per_second: float
    ratio: float
    same_tokens: bool


@dataclass(frozen=True)
class SpeculationRow:
    """Plain and speculative decoding of the same request."""

    plain_tokens_per_second: float
    speculative_tokens_per_second: float
    ratio: float
    accepted_tokens_per_step: float


def measure_against_transformers(
    *, batch_sizes: tuple[int, ...] = (1, 8), num_threads: int = 2, rounds: int = 5, prompt_tokens: int = 32,
    new_tokens: int = 128,
) -> list[DecodeRow]:  # fmt: skip
    """Measures plain greedy decoding of `tiny` with random weights. transformers uses its cache and no padding."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    model = random_model()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_model(model, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    llm = LLM(model, speculative=False)
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    rows = []
    for batch_size in batch_sizes:
        generator = torch.Generator().manual_seed(batch_size)
        prompts = torch.randint(0, model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)

        def run_ours(prompts: torch.Tensor = prompts) -> list[list[int]]:
            return [completion.token_ids for completion in llm.generate(prompts.tolist(), params)]

        def run_theirs(prompts: torch.Tensor = prompts) -> list[list[int]]:
            ids = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
            return ids[:, prompt_tokens:].tolist()

        same_tokens = run_ours() == run_theirs()
        ours_ms, theirs_ms = median_milliseconds([run_ours, run_theirs], rounds=rounds)
        total = 1e3 * batch_size * new_tokens
        rows.append(
            DecodeRow(
                batch_size=batch_size,
                openmimo_tokens_per_second=total / ours_ms,
                transformers_tokens_per_second=total / theirs_ms,
                ratio=theirs_ms / ours_ms,
                same_tokens=same_tokens,
            )
        )
    return rows


def measure_speculation(*, num_threads: int = 2, rounds: int = 5, new_tokens: int = 128) -> SpeculationRow:
    """Measures the upper limit of one MTP head, with a `tiny` model whose head is always right."""
    torch.set_num_threads(num_threads)
    model = counting_model()
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    plain, speculative = LLM(model, speculative=False), LLM(model, speculative=True)
    prompt = [list(range(32))]
    plain_ms, speculative_ms = median_milliseconds(
        [lambda: plain.generate(prompt, params), lambda: speculative.generate(prompt, params)], rounds=rounds
    )
    return SpeculationRow(
        plain_tokens_per_second=1e3 * new_tokens / plain_ms,
        speculative_tokens_per_second=1e3 * new_tokens / speculative_ms,
        ratio=plain_ms / speculative_ms,
        accepted_tokens_per_step=speculative.stats()["accepted_tokens_per_step"],
    )


def random_model() -> MiMo:
    """Returns `tiny` with weights large enough that greedy text does not repeat one token."""
    model = MiMo(replace(tiny(), max_positions=4096, init_std=0.1))
    model.initialize(torch.Generator().manual_seed(0))
    return model.eval()


@torch.no_grad()
def counting_model() -> MiMo:
    """Returns a model that continues token t with t+1: zero layers, and an output head of shifted embeddings."""
    model = random_model()
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight.copy_(embedding.roll(1, dims=0))
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()
    eye = torch.eye(model.config.hidden_size)
    for block in model.model.mtp.layers:
        block.eh_proj.weight.copy_(torch.cat([eye, torch.zeros_like(eye)], dim=1))
    return model
