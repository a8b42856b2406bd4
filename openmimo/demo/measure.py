"""Measurements of the demo: retrieval by context length, decoding with and without drafts, cache bytes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from openmimo.core.config import to_dict
from openmimo.core.records import SamplingParams
from openmimo.data.chat.conversation import encode_prompt
from openmimo.data.source import TextSource, open_source, read_documents, split_of
from openmimo.data.tokenizer import Tokenizer
from openmimo.demo.config import DemoConfig
from openmimo.engine.llm import LLM
from openmimo.evals.config import EvalConfig
from openmimo.evals.runner import run as run_evaluation
from openmimo.model.hf import load_model
from openmimo.rl.agents.environment import open_environment

_PROMPT_TOKENS = 64


def measure_retrieval(config: DemoConfig, checkpoint: str) -> dict[str, Any]:
    """Measures retrieval at every length. Raises the model's position limit, to include lengths beyond its training."""
    model = load_model(checkpoint)
    model.config = replace(model.config, max_positions=max(config.retrieval_lengths) + 1)
    llm = LLM(model, Tokenizer.load(checkpoint))
    evaluation = EvalConfig(
        path=checkpoint,
        task="needle",
        lengths=config.retrieval_lengths,
        examples=config.retrieval_examples,
        options={"num_pairs": config.retrieval_pairs},
    )
    return {"scores": to_dict(run_evaluation(evaluation, llm))}


def measure_decoding(config: DemoConfig, model_folder: Path) -> dict[str, Any]:
    """Decodes held-out texts greedily, one at a time, with and without drafts.

    Returns:
        The statistics of both engines, whether their texts are equal, cache sizes, and the texts.
    """
    prompts = _held_out_prompts(config, Tokenizer.load(model_folder))
    params = SamplingParams(max_tokens=config.decode_tokens, temperature=0.0, ignore_eos=True)
    results: dict[str, Any] = {}
    texts: dict[str, list[list[int]]] = {}
    for name, speculative in (("plain", False), ("speculative", True)):
        llm = LLM(model_folder, speculative=speculative)
        llm.generate([prompts[0]], params)  # warm-up: excludes one-time costs of the process
        llm.reset_stats()
        texts[name] = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
        results[name] = llm.stats()
    long_llm = LLM(model_folder, speculative=False)
    positions = long_llm.model.config.max_positions
    long_llm.generate([(prompts[0] * positions)[: positions - 2]], replace(params, max_tokens=1))
    tokenizer = long_llm.tokenizer
    assert tokenizer is not None
    return {
        **results,
        "same_text": texts["plain"] == texts["speculative"],
        "cache_positions": positions,
        "cache_bytes": long_llm.stats()["cache_bytes"],
        "all_global_cache_bytes": long_llm.stats()["all_global_cache_bytes"],
        "samples": [
            {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(text)}
            for prompt, text in zip(prompts, texts["plain"], strict=True)
        ],
    }


def measure_answers(config: DemoConfig) -> dict[str, Any]:
    """Measures drafting on held-out problems at temperature 1, before and after distillation."""
    results = {}
    for name, folder in (("sft", config.sft.run_folder), ("student", config.mopd.run_folder)):
        llm = LLM(Path(folder) / "model", speculative=True, adaptive_drafts=False)
        assert llm.tokenizer is not None
        prompts = []
        for source in config.mopd.sources:
            environment, options = open_environment(source.environment, source.options)
            problem_at = environment.problems(options, "validation", config.mopd.seed)
            for index in range(config.decode_prompts):
                episode = environment.open(problem_at(index), options)
                prompts.append(encode_prompt(llm.tokenizer, episode.messages))
        for number, prompt in enumerate(prompts):
            llm.generate([prompt], SamplingParams(max_tokens=16, temperature=1.0, seed=number))
        results[name] = llm.stats()
    return results


def _held_out_prompts(config: DemoConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the beginnings of held-out documents from the text source of the context extension."""
    mixture = config.extend.mixture
    source = next(source for source in mixture.sources if isinstance(open_source(source)[0], TextSource))
    prompts: list[list[int]] = []
    for text in read_documents(source):
        if split_of(text, mixture.validation_fraction) != "validation":
            continue
        ids = tokenizer.encode(text[: 20 * _PROMPT_TOKENS])
        if len(ids) >= _PROMPT_TOKENS:
            prompts.append(ids[:_PROMPT_TOKENS])
        if len(prompts) == config.decode_prompts:
            break
    return prompts
