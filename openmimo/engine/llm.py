"""The engine's front: prompts in, completions out."""

import itertools
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.fields import checked, unknown_key_message
from openmimo.core.records import Completion, Request, SamplingParams
from openmimo.data.tokenizer import Tokenizer
from openmimo.data.tokenizer_files import has_tokenizer
from openmimo.engine.config import EngineConfig, WeightFormat, chosen_format
from openmimo.engine.engine import Engine, check_token_ids
from openmimo.engine.request_state import NOT_FINITE, RequestState
from openmimo.model.context import PackedContext
from openmimo.model.hf import load_model
from openmimo.model.mimo import MiMo

Prompts = str | list[str] | list[list[int]]


class LLM:
    """A model that generates and scores.

    Args:
        model: A checkpoint folder in the Hugging Face layout, or a model in memory. The caller may change the weights
            of the latter between calls.
        tokenizer: That of the folder by default. Without one, the LLM takes and returns token ids, and no text.
        engine: Batching, cache and drafting (None: the defaults of `EngineConfig`, but a step that also decodes reads
            as many prompt tokens as any other: no client waits for single tokens of a batch).
        speculative: Draft with the MTP heads (None: as `engine` says).
        dtype: Of the weights and activations of a folder. In bfloat16 a text may depend on the other prompts of its
            batch.
        device: Where a folder is loaded ("auto": the accelerator if there is one).
        weights: How the weight matrices of a folder are held: plain (in `dtype`), int8 or fp8; see `load_model`.
        int8: The earlier name of weights="int8".
        settings: Single fields of `EngineConfig`, which replace those of `engine`.

    Raises:
        UserError: An argument is wrong, or the folder cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path | MiMo,
        tokenizer: Tokenizer | None = None,
        *,
        engine: EngineConfig | None = None,
        speculative: bool | None = None,
        dtype: str = "float32",
        device: str = "auto",
        weights: WeightFormat = "plain",
        int8: bool = False,
        **settings: Any,
    ):
        if speculative is not None:
            settings["speculative"] = speculative
        config = _engine_config(engine, settings)
        if not isinstance(model, (str, Path, MiMo)):
            raise ConfigError(f"model is a {type(model).__name__}; give a checkpoint folder, or a MiMo.")
        if not (tokenizer is None or isinstance(tokenizer, Tokenizer)):
            raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; give what Tokenizer.load returns.")
        weights = chosen_format(checked(WeightFormat, weights, "weights"), int8=checked(bool, int8, "int8"))
        self._is_borrowed = isinstance(model, MiMo)
        if not isinstance(model, MiMo):
            if tokenizer is None and has_tokenizer(Path(model)):
                tokenizer = Tokenizer.load(model)
            model = load_model(model, dtype=dtype, device=device, weights=weights)
        elif weights != "plain":
            raise ConfigError(
                f"weights={weights!r} would change the weights of a model that is the caller's; give a folder instead."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer, config)
        self.num_drafts = self.engine.num_drafts
        self._request_numbers = itertools.count()

    def generate(
        self, prompts: Prompts, params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completes texts or lists of token ids, all in one batch that sequences leave as they finish.

        One `params` for all, or one each. The completions are in the order of the prompts. A sequence that reaches the
        model's last position ends there with finish_reason "length". One that fails (weights that are not finite, a
        structure that cannot be followed) ends with "error" and says why in `Completion.error`; the others go on.
        Raises UserError for an empty or too long prompt, an id outside the vocabulary, text without a tokenizer, or an
        argument of a wrong type.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)):
            raise UserError(
                f"prompts is a {type(prompts).__name__}; give a text, or a list of texts or of lists of token ids."
            )
        each = params if isinstance(params, (list, tuple)) else [params] * len(prompts)
        each = [_checked_params(p) for p in each]
        if len(each) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts came with {len(each)} SamplingParams; give one for all or one each."
            )
        pairs: Iterator[tuple[Any, SamplingParams]] = zip(prompts, each, strict=True)
        requests = [self._request(prompt, p, f"prompt {number}") for number, (prompt, p) in enumerate(pairs)]
        sequences = [self.engine.submit(request) for request in requests]
        for _ in self._run(sequences):
            pass
        return [sequence.completion() for sequence in sequences]

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one completion, in pieces as they become certain: a stop string never shows, not even in part.

        Raises UserError as `generate` does; while the text is read, where `generate` gives a `Completion.error`.
        """
        if self.tokenizer is None:
            raise UserError("stream gives text, but this LLM has no tokenizer; give one, or use generate.")
        return self._stream(self._request(prompt, _checked_params(params), "the prompt"))

    @torch.inference_mode()
    def score(self, token_ids: list[int] | torch.Tensor) -> torch.Tensor:
        """Log-probability of each token given those before it, float32 on the CPU, [len(token_ids) - 1].

        Entry i belongs to token i+1: the first token has nothing before it, and so no entry. Raises UserError for what
        are no ids of the vocabulary, and for weights that give values which are not finite.
        """
        token_ids = _token_list(token_ids, "token_ids")
        check_token_ids(tuple(token_ids), self.model.config, "token_ids", room=0)
        tokens_T = torch.tensor(token_ids, device=self.model.device)
        states_TD = self.model(tokens_T, PackedContext((len(token_ids),), device=self.model.device)).post_norm_TD
        logprobs = self.model.head.logprobs(states_TD[:-1], tokens_T[1:]).float().cpu()
        if not logprobs.isfinite().all():
            raise UserError(f"{NOT_FINITE}.")
        return logprobs

    def stats(self) -> dict[str, float | int | list[float]]:
        """What was counted since the LLM was made or `reset_stats` was called.

        accepted_tokens_per_step: tokens a sequence gains per decoding pass of the main model (1.0 without drafts).
        acceptance_by_head: per MTP head, the share of its drafts found right, of those behind no wrong one.
        cache_bytes: most bytes that the caches held at once; all_global_cache_bytes: what the same positions take in a
        model whose layers are all full. tokens_per_second: new tokens by wall time, prefill included.
        num_steps: decoding passes. num_prompt_tokens: prompt tokens computed, num_cached_tokens: those reused. Also
        seconds, num_new_tokens.
        """
        return self.engine.stats.report()

    def reset_stats(self) -> None:
        """Starts counting anew."""
        self.engine.reset_stats()

    def _run(self, sequences: list[RequestState]) -> Iterator[None]:
        """Steps until these sequences have ended, pausing after every step. If the caller stops early, they end."""
        try:
            while not all(sequence.finish_reason for sequence in sequences):
                self.engine.step()
                yield
        finally:
            for sequence in sequences:
                if not sequence.finish_reason:
                    self.engine.abort(sequence.request.id)
            if self._is_borrowed:
                self.engine.forget_cached()

    def _stream(self, request: Request) -> Iterator[str]:
        sequence = self.engine.submit(request)
        assert sequence.text is not None, "an engine with a tokenizer makes text"
        for _ in self._run([sequence]):
            piece = sequence.text.take()
            if piece:
                yield piece
        if sequence.error:
            raise UserError(f"{sequence.error}.")

    def _request(self, prompt: str | list[int], params: SamplingParams, where: str) -> Request:
        token_ids = tuple(self._encode(prompt, where))
        check_token_ids(token_ids, self.model.config, where, room=1)
        request = Request(str(next(self._request_numbers)), token_ids, params)
        self.engine.check(request)
        return request

    def _encode(self, prompt: str | list[int], where: str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"{where} is text, but this LLM has no tokenizer; give one, or give token ids.")
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise UserError(f"{where} holds half a character (a lone surrogate), which UTF-8 cannot express.")
            return self.tokenizer.encode(prompt)
        return _token_list(prompt, where)


def _engine_config(engine: EngineConfig | None, settings: dict[str, Any]) -> EngineConfig:
    """`engine` with some of its fields replaced. Raises ConfigError."""
    known = [field.name for field in fields(EngineConfig)]
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"{unknown_key_message(unknown, known, 'EngineConfig')}; LLM takes its fields as keywords.")
    if engine is None:
        config = EngineConfig(**settings)
        return (
            config
            if "mixed_prefill_tokens" in settings
            else replace(config, mixed_prefill_tokens=config.prefill_tokens)
        )
    if not isinstance(engine, EngineConfig):
        raise ConfigError(f"engine is a {type(engine).__name__}; give an EngineConfig.")
    return replace(engine, **settings)


def _token_list(ids: list[int] | torch.Tensor, where: str) -> list[int]:
    """Token ids as a list, from one of a user's or a tensor; numbers of NumPy become Python's. Raises UserError."""
    if isinstance(ids, (torch.Tensor, np.ndarray)):
        if ids.ndim != 1:
            raise UserError(f"{where} has {ids.ndim} dimensions; token ids are a list or a tensor of one dimension.")
        return ids.tolist()
    if not isinstance(ids, (list, tuple)):
        raise UserError(f"{where} is a {type(ids).__name__}; give a text or a list of token ids.")
    return [int(token) if isinstance(token, np.integer) else token for token in ids]


def _checked_params(params: SamplingParams | None) -> SamplingParams:
    """The defaults for None. Raises ConfigError for what is no SamplingParams."""
    if not (params is None or isinstance(params, SamplingParams)):
        raise ConfigError(f"params is a {type(params).__name__}; give SamplingParams, or a list of them.")
    return params or SamplingParams()
