"""The offline interface of the engine: prompts in, completions out."""

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
from openmimo.core.registry import load_object
from openmimo.data.tokenizer import Tokenizer
from openmimo.data.tokenizer_files import has_tokenizer
from openmimo.engine.config import EngineConfig, WeightFormat, chosen_format
from openmimo.engine.engine import Engine, check_token_ids
from openmimo.engine.request_state import NOT_FINITE, RequestState
from openmimo.engine.runner import Ranks
from openmimo.model.context import PackedContext
from openmimo.model.hf import load_model
from openmimo.model.mimo import MiMo

Prompts = str | list[str] | list[list[int]]


class LLM:
    """A model that generates and scores.

    Args:
        model: A checkpoint folder in the Hugging Face layout, or a model in memory. The caller may change the weights
            of a model in memory between calls.
        tokenizer: The tokenizer (None: that of the folder). Without a tokenizer, the LLM works on token ids only.
        engine: Batching, cache and drafting. None: the defaults of `EngineConfig`, except that steps with decoding
            process as many prompt tokens as other steps, because no client waits for single tokens of a batch.
        speculative: Whether to draft with the MTP heads (None: as in `engine`).
        dtype: Dtype of weights and activations of a folder. In bfloat16, a text may depend on the other prompts of its
            batch.
        device: Device of a folder's model ("auto": the accelerator if available).
        weights: Format of a folder's weight matrices: plain (in `dtype`), int8, fp8 or a packed one; see `load_model`.
        int8: The earlier name of weights="int8".
        settings: Fields of `EngineConfig` that replace those of `engine`.

    Raises:
        UserError: An argument is invalid, or the folder cannot be loaded.
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
            raise ConfigError(f"model is a {type(model).__name__}; give a checkpoint folder or a MiMo.")
        if not (tokenizer is None or isinstance(tokenizer, Tokenizer)):
            raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; give what Tokenizer.load returns.")
        weights = chosen_format(checked(WeightFormat, weights, "weights"), int8=checked(bool, int8, "int8"))
        self._is_borrowed = isinstance(model, MiMo)
        self._ranks: Ranks | None = None
        if not isinstance(model, MiMo):
            if tokenizer is None and has_tokenizer(Path(model)):
                tokenizer = Tokenizer.load(model)
            if config.tp > 1:
                self._ranks = load_object("openmimo.engine.team:Team")(
                    model, config, dtype=dtype, device=device, weights=weights
                )
                model = self._ranks.model
            else:
                model = load_model(model, dtype=dtype, device=device, weights=weights)
        elif weights != "plain":
            raise ConfigError(
                f"weights={weights!r} would change the weights of the caller's model; give a checkpoint folder instead."
            )
        self.model = model
        self.tokenizer = tokenizer
        try:
            self.engine = Engine(model, tokenizer, config, ranks=self._ranks)
        except BaseException:
            self.close()
            raise
        self.num_drafts = self.engine.num_drafts
        self._request_numbers = itertools.count()

    def generate(
        self, prompts: Prompts, params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete texts or lists of token ids in one continuous batch.

        A sequence that reaches the model's last position ends with finish_reason "length". A sequence that fails
        (weights that are not finite, a structure that cannot be satisfied) ends with "error" and a message in
        `Completion.error`. The others continue.

        Args:
            prompts: A text, or a list of texts or of lists of token ids.
            params: Sampling parameters for all prompts, or a list with those of each prompt.

        Returns:
            The completions in the order of the prompts.

        Raises:
            UserError: A prompt is empty or too long, an id is outside the vocabulary, there is text but no tokenizer,
                or an argument has a wrong type.
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
                f"{len(prompts)} prompts came with {len(each)} SamplingParams; give one for all, or one for each."
            )
        pairs: Iterator[tuple[Any, SamplingParams]] = zip(prompts, each, strict=True)
        requests = [self._request(prompt, p, f"prompt {number}") for number, (prompt, p) in enumerate(pairs)]
        sequences = [self.engine.submit(request) for request in requests]
        for _ in self._run(sequences):
            pass
        return [sequence.completion() for sequence in sequences]

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one completion in pieces. A piece never contains a part of a stop string.

        Raises UserError as `generate` does. Failures that `generate` reports in `Completion.error` raise it during the
        iteration.
        """
        if self.tokenizer is None:
            raise UserError("stream yields text, but this LLM has no tokenizer; give one, or use generate.")
        return self._stream(self._request(prompt, _checked_params(params), "the prompt"))

    @torch.inference_mode()
    def score(self, token_ids: list[int] | torch.Tensor) -> torch.Tensor:
        """Return the log-probability of each token given the previous ones, float32 on the CPU, [len(token_ids) - 1].

        Entry i belongs to token i+1, because the first token has no previous tokens.

        Raises:
            UserError: `token_ids` are not ids of the vocabulary, or the model gives values that are not finite.
        """
        token_ids = _token_list(token_ids, "token_ids")
        check_token_ids(tuple(token_ids), self.model.config, "token_ids", room=0)
        tokens_T = torch.tensor(token_ids, device=self.model.device)
        if self._ranks is not None:
            logprobs = self._ranks.text_logprobs(tokens_T).float().cpu()
        else:
            states_TD = self.model(tokens_T, PackedContext((len(token_ids),), device=self.model.device)).post_norm_TD
            logprobs = self.model.head.logprobs(states_TD[:-1], tokens_T[1:]).float().cpu()
        if not logprobs.isfinite().all():
            raise UserError(f"{NOT_FINITE}.")
        return logprobs

    def stats(self) -> dict[str, float | int | list[float] | list[int] | str]:
        """Return the statistics since the LLM was created or `reset_stats` was called.

        Returns:
            accepted_tokens_per_step: Tokens per sequence and decoding pass of the main model (1.0 without drafts).
            acceptance_by_head: Share of accepted drafts of each MTP head, among those after accepted drafts only.
            accepted_per_step_by_head: Accepted drafts of each MTP head per sequence and decoding pass.
            steps_by_drafts: Sequences of all decoding passes, by the number of their drafts.
            cache_bytes: Maximum bytes in the caches.
            all_global_cache_bytes: The bytes of the same positions in a model with full attention in all layers.
            tokens_per_second: New tokens by wall time, including prefill.
            num_steps: Decoding passes.
            num_prompt_tokens: Computed prompt tokens.
            num_cached_tokens: Prompt tokens that were reused from the cache.
            seconds, num_new_tokens: Wall time and number of new tokens.
            num_graphs, graph_seconds, graph_bytes: Captured graphs of an accelerator, time of their capture, and their
                memory.
            num_graph_passes, num_other_passes: Passes that replayed a graph, and passes that did not.
            num_ranks, weight_bytes_by_rank, cache_bytes_by_rank, why_no_graphs: With `EngineConfig.tp` only: number of
                ranks, memory of each, and why none captures graphs. Other bytes are those of one rank.
        """
        return self.engine.stats.report() | (self._ranks.report() if self._ranks else {})

    def close(self) -> None:
        """End the other processes of an LLM on several devices, which cannot be used any more. Else does nothing.

        They also end with this process, and when the LLM is no longer referenced.
        """
        if self._ranks is not None:
            self._ranks.close()

    def reset_stats(self) -> None:
        """Reset the statistics."""
        self.engine.reset_stats()

    def _run(self, sequences: list[RequestState]) -> Iterator[None]:
        """Run steps until these sequences have finished, yielding after each. They are aborted if the caller stops."""
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
                raise UserError(f"{where} contains a lone surrogate, half of a character, which UTF-8 cannot encode.")
            return self.tokenizer.encode(prompt)
        return _token_list(prompt, where)


def _engine_config(engine: EngineConfig | None, settings: dict[str, Any]) -> EngineConfig:
    """Return `engine` with some of its fields replaced. Raises ConfigError."""
    known = [field.name for field in fields(EngineConfig)]
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"{unknown_key_message(unknown, known, 'EngineConfig')}; LLM takes its fields as keywords.")
    if engine is None:
        config = EngineConfig(**settings)
        return config if "mixed_prefill_tokens" in settings else replace(config, mixed_prefill_tokens="all")
    if not isinstance(engine, EngineConfig):
        raise ConfigError(f"engine is a {type(engine).__name__}; give an EngineConfig.")
    return replace(engine, **settings)


def _token_list(ids: list[int] | torch.Tensor, where: str) -> list[int]:
    """Return token ids as a list of Python integers. Raises UserError if `ids` is not a list or 1-D tensor."""
    if isinstance(ids, (torch.Tensor, np.ndarray)):
        if ids.ndim != 1:
            raise UserError(f"{where} has {ids.ndim} dimensions; token ids are a list or a tensor of one dimension.")
        return ids.tolist()
    if not isinstance(ids, (list, tuple)):
        raise UserError(f"{where} is a {type(ids).__name__}; give a text or a list of token ids.")
    return [int(token) if isinstance(token, np.integer) else token for token in ids]


def _checked_params(params: SamplingParams | None) -> SamplingParams:
    """Return `params`, or the defaults for None. Raises ConfigError for another type."""
    if not (params is None or isinstance(params, SamplingParams)):
        raise ConfigError(f"params is a {type(params).__name__}; give SamplingParams, or a list of them.")
    return params or SamplingParams()
