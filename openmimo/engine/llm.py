"""The engine's front: prompts in, completions out."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.fields import checked
from openmimo.core.records import Completion, Request, SamplingParams
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine, check_token_ids
from openmimo.engine.request_state import NOT_FINITE, RequestState
from openmimo.engine.weights import quantize_linears
from openmimo.model.context import PackedContext
from openmimo.model.hf import load_model
from openmimo.model.mimo import MiMo

Prompts = str | list[str] | list[list[int]]


class LLM:
    """A model that generates and scores.

    model: a checkpoint folder in the Hugging Face layout, or a model in memory, which stays the caller's: its weights
    may be changed between calls. tokenizer: that of the folder by default; without one, token ids go in and come out,
    and no text. dtype, device: how a folder is loaded ("auto": the accelerator if there is one); in bfloat16 a text may
    depend on the prompts that are read with it. int8: keep linear layers (not the experts) as int8. The others are
    those of `EngineConfig`: speculative, num_drafts and adaptive_drafts (drafting with the MTP heads), max_sequences
    (how many requests run at once), prefill_tokens, cache_gigabytes, prefix_cache. Raises UserError.
    """

    def __init__(
        self,
        model: str | Path | MiMo,
        tokenizer: Tokenizer | None = None,
        *,
        speculative: bool | None = None,
        num_drafts: int | None = None,
        adaptive_drafts: bool = True,
        dtype: str = "float32",
        device: str = "auto",
        max_sequences: int = 64,
        prefill_tokens: int = 1024,
        cache_gigabytes: float | None = None,
        prefix_cache: bool = True,
        int8: bool = False,
    ):
        config = EngineConfig(
            max_sequences=max_sequences,
            prefill_tokens=prefill_tokens,
            mixed_prefill_tokens=prefill_tokens,  # nobody waits for single tokens of a batch
            cache_gigabytes=cache_gigabytes,
            prefix_cache=prefix_cache,
            speculative=speculative,
            num_drafts=num_drafts,
            adaptive_drafts=adaptive_drafts,
        )
        if not isinstance(model, (str, Path, MiMo)):
            raise ConfigError(f"model is a {type(model).__name__}; give a checkpoint folder, or a MiMo.")
        if not (tokenizer is None or isinstance(tokenizer, Tokenizer)):
            raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; give what Tokenizer.load returns.")
        int8 = checked(bool, int8, "int8")
        self._is_borrowed = isinstance(model, MiMo)
        if not isinstance(model, MiMo):
            if tokenizer is None and (Path(model) / "tokenizer.json").exists():
                tokenizer = Tokenizer.load(model)
            model = load_model(model, dtype=dtype, device=device)
            if int8:
                quantize_linears(model)
        elif int8:
            raise ConfigError("int8 would change the weights of a model that is the caller's; give a folder instead.")
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
        pairs = zip(prompts, each, strict=True)
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
