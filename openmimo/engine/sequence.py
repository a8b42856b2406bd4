"""The state of one request while it is decoded."""

from dataclasses import dataclass, field

import torch

from openmimo.core.records import Completion, SamplingParams
from openmimo.engine.cache import KVCache
from openmimo.engine.text import TextStream


@dataclass
class Sequence:
    """One request: its confirmed tokens (prompt first), its cache, and what is still to be confirmed.

    Between steps the main layers have seen every token but the last. max_length: tokens at most, prompt included.
    cache: held from the prefill to the last token. drafts: tokens that the MTP heads expect next. states_TD: main-model
    states of the last slots, which the heads will read (again). text: None where there is no tokenizer. finish_reason:
    as in Completion, "" while it runs.
    """

    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    max_length: int
    stop_ids: frozenset[int]
    cache: KVCache | None = None
    text: TextStream | None = None
    drafts: list[int] = field(default_factory=list)
    states_TD: torch.Tensor | None = None
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def room(self) -> int:
        """How many tokens may still come."""
        return self.max_length - len(self.tokens)

    def add(self, token: int, logprob: float | None) -> None:
        """Confirms one token, and decides whether it is the last: a stop id, a stop string, or no room for more."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self.stop_ids:
            self._finish("stop")
            return
        if self.text is not None:
            self.text.push(token)
            if self.text.stopped:
                self._finish("stop")
                return
        if self.room == 0:
            self._finish("length")

    def completion(self) -> Completion:
        """The record that the caller gets. The token that ended it is in `token_ids` but not in the text."""
        return Completion(
            prompt_token_ids=self.tokens[: self.prompt_length],
            token_ids=self.tokens[self.prompt_length :],
            text=self.text.text if self.text is not None else "",
            logprobs=self.logprobs if self.params.logprobs else None,
            finish_reason=self.finish_reason,
        )

    def release(self) -> None:
        """Gives back the memory that only decoding needs."""
        self.cache = None
        self.states_TD = None

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self.text is not None:
            self.text.finish()
