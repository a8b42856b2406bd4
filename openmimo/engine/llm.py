"""The engine's front: prompts in, completions out."""

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from openmimo.core.errors import ConfigError, UserError
from openmimo.core.records import Completion, SamplingParams
from openmimo.data.tokenizer import StreamDecoder, Tokenizer
from openmimo.engine.runner import Runner
from openmimo.engine.sequence import Sequence
from openmimo.engine.stats import EngineStats
from openmimo.engine.text import TextStream
from openmimo.kernels.token_loss import token_logprobs
from openmimo.model.config import ModelConfig
from openmimo.model.context import PackedContext
from openmimo.model.flops import active_matmul_parameters
from openmimo.model.hf import load_model
from openmimo.model.mimo import MiMo
from openmimo.runtime.device import at_most_threads, resolve_device

_SMALL_MODEL_PARAMETERS = 20_000_000  # below, waking a second CPU thread for a token takes longer than it saves

Prompts = str | list[str] | list[list[int]]


class LLM:
    """A model that generates and scores.

    model: a checkpoint folder in the Hugging Face layout, or a model in memory, which stays the caller's: its weights
    may be changed between calls. tokenizer: that of the folder by default; without one, token ids go in and come out,
    and no text. speculative: draft with the model's MTP heads; by default wherever there are some. num_drafts: how many
    heads draft (all by default). dtype, device: how a folder is loaded ("auto": the accelerator if there is one).
    max_sequences: how many requests run at once; the others wait. prefill_tokens: prompt tokens per pass at most.
    Raises UserError.
    """

    def __init__(
        self,
        model: str | Path | MiMo,
        tokenizer: Tokenizer | None = None,
        *,
        speculative: bool | None = None,
        num_drafts: int | None = None,
        dtype: str = "float32",
        device: str = "auto",
        max_sequences: int = 64,
        prefill_tokens: int = 1024,
    ):
        if max_sequences < 1 or prefill_tokens < 1:
            raise ConfigError(
                f"max_sequences ({max_sequences}) and prefill_tokens ({prefill_tokens}) must be 1 or more."
            )
        if not isinstance(model, MiMo):
            if tokenizer is None and (Path(model) / "tokenizer.json").exists():
                tokenizer = Tokenizer.load(model)
            model = load_model(model, dtype=dtype, device=str(resolve_device(device)))
        self.model = model
        self.tokenizer = tokenizer
        self.num_drafts = _num_drafts(model.config, speculative, num_drafts)
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the model embeds {model.config.vocab_size}; "
                "they are not of the same checkpoint."
            )
        self._eos_ids = _eos_ids(model.config, tokenizer)
        self._max_sequences = max_sequences
        self._prefill_tokens = prefill_tokens
        is_small = active_matmul_parameters(model.config) < _SMALL_MODEL_PARAMETERS
        self._decode_threads = 1 if is_small else torch.get_num_threads()
        self.reset_stats()

    def generate(
        self, prompts: Prompts, params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completes texts or lists of token ids, all in one batch that sequences leave as they finish.

        One `params` for all, or one each. The completions are in the order of the prompts. A sequence that reaches the
        model's last position ends there with finish_reason "length". Raises UserError for an empty or too long prompt,
        an id outside the vocabulary, or text without a tokenizer.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        each = params if isinstance(params, list) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts came with {len(each)} SamplingParams; give one for all or one each."
            )
        pairs = zip(prompts, each, strict=True)
        sequences = [self._sequence(prompt, p, f"prompt {number}") for number, (prompt, p) in enumerate(pairs)]
        for _ in self._decode(sequences):
            pass
        return [sequence.completion() for sequence in sequences]

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one completion, in pieces as they become certain: a stop string never shows, not even in part."""
        if self.tokenizer is None:
            raise UserError("stream gives text, but this LLM has no tokenizer; give one, or use generate.")
        sequence = self._sequence(prompt, params or SamplingParams(), "the prompt")
        return self._stream(sequence)

    @torch.inference_mode()
    def score(self, token_ids: list[int] | torch.Tensor) -> torch.Tensor:
        """Log-probability of each token given those before it, float32 on the CPU, [len(token_ids) - 1].

        Entry i belongs to token i+1: the first token has nothing before it, and so no entry.
        """
        token_ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else token_ids
        self._check_prompt(token_ids, "the token ids to score", room=0)
        tokens_T = torch.tensor(token_ids, device=self.model.device)
        states_TD = self.model(tokens_T, PackedContext((len(token_ids),), device=self.model.device)).post_norm_TD
        weight_VD = self.model.lm_head.weight.to(states_TD.dtype)
        return token_logprobs(states_TD[:-1], weight_VD, tokens_T[1:]).float().cpu()

    def stats(self) -> dict[str, float | int | list[float]]:
        """What was counted since the LLM was made or `reset_stats` was called.

        accepted_tokens_per_step: tokens a sequence gains per decoding pass of the main model (1.0 without drafts).
        acceptance_by_head: per MTP head, the share of its drafts found right, of those behind no wrong one.
        cache_bytes: most bytes that the caches held at once; all_global_cache_bytes: what the same positions take in a
        model whose layers are all full. tokens_per_second: new tokens by wall time, prefill included.
        num_steps: decoding passes. Also seconds, num_new_tokens, num_prompt_tokens.
        """
        return self._stats.report()

    def reset_stats(self) -> None:
        """Starts counting anew."""
        self._stats = EngineStats(offered=[0] * self.num_drafts, accepted=[0] * self.num_drafts)
        self._runner = Runner(
            self.model, num_drafts=self.num_drafts, prefill_tokens=self._prefill_tokens, stats=self._stats
        )

    def _decode(self, sequences: list[Sequence]) -> Iterator[None]:
        """Runs the sequences to their ends, and pauses after every step. Waiting ones join as others leave."""
        waiting, running = list(sequences), []
        while waiting or running:
            start = time.perf_counter()
            room = self._max_sequences - len(running)
            joining, waiting = waiting[:room], waiting[room:]
            if joining:
                self._runner.prefill(joining)
                running += joining
            going = [sequence for sequence in running if not sequence.finish_reason]
            if going:
                with at_most_threads(self._decode_threads):
                    self._runner.step(going)
            finished = [sequence for sequence in running if sequence.finish_reason]
            if finished:
                self._stats.observe_caches(running)
            for sequence in finished:
                sequence.release()
            running = [sequence for sequence in running if not sequence.finish_reason]
            self._stats.seconds += time.perf_counter() - start
            yield

    def _stream(self, sequence: Sequence) -> Iterator[str]:
        for _ in self._decode([sequence]):
            piece = sequence.text.take()
            if piece:
                yield piece

    def _sequence(self, prompt: str | list[int], params: SamplingParams, where: str) -> Sequence:
        token_ids = self._encode(prompt, where)
        self._check_prompt(token_ids, where, room=1)
        if params.stop and self.tokenizer is None:
            raise UserError("SamplingParams.stop is text, but this LLM has no tokenizer; use stop_token_ids.")
        max_length = min(len(token_ids) + params.max_tokens, self.model.config.max_positions)
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        return Sequence(
            tokens=token_ids,
            prompt_length=len(token_ids),
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_length=max_length,
            stop_ids=eos_ids | frozenset(params.stop_token_ids),
            text=TextStream(StreamDecoder(self.tokenizer), params.stop) if self.tokenizer else None,
        )

    def _encode(self, prompt: str | list[int], where: str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"{where} is text, but this LLM has no tokenizer; give one, or give token ids.")
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, (list, tuple)):
            raise UserError(f"{where} is a {type(prompt).__name__}; a prompt is a text or a list of token ids.")
        return list(prompt)

    def _check_prompt(self, token_ids: list[int], where: str, *, room: int) -> None:
        config = self.model.config
        if not token_ids:
            raise UserError(f"{where} is empty; give at least one token.")
        if len(token_ids) + room > config.max_positions:
            raise UserError(
                f"{where} has {len(token_ids)} tokens, but the model has {config.max_positions} positions; shorten it."
            )
        outside = [token for token in token_ids if not 0 <= token < config.vocab_size]
        if outside:
            raise UserError(f"{where} holds id {outside[0]}, but the model's ids are 0 to {config.vocab_size - 1}.")


def _num_drafts(config: ModelConfig, speculative: bool | None, num_drafts: int | None) -> int:
    """How many heads draft. Raises ConfigError where that contradicts the model or itself."""
    heads = config.num_mtp_heads
    if speculative and not heads:
        raise ConfigError(
            "speculative=True, but the model has no MTP heads to draft with; use speculative=False, or a checkpoint "
            "with heads."
        )
    if num_drafts is not None and speculative is False:
        raise ConfigError(
            f"num_drafts is {num_drafts}, which has no effect with speculative=False; give one of the two."
        )
    if num_drafts is not None and not 1 <= num_drafts <= heads:
        raise ConfigError(f"num_drafts is {num_drafts}; the model has {heads} MTP heads, so it must be 1 to {heads}.")
    if speculative is False:
        return 0
    return heads if num_drafts is None else num_drafts


def _eos_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Every id that the checkpoint says ends a text."""
    of_config = config.token_ids.get("eos_token_id")
    ids = [] if of_config is None else of_config if isinstance(of_config, list) else [of_config]
    return frozenset(ids) | frozenset(tokenizer.eos_token_ids if tokenizer else ())
