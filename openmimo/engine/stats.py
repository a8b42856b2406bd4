"""What the engine counts while it works."""

import warnings
from dataclasses import dataclass, field

from openmimo.engine.cache import PageArena
from openmimo.engine.request_state import RequestState

# Heads that were loaded from the wrong tensors, or never trained, are right by chance: say so, once.
_DRAFTS_OF_A_CHECK = 1000
_MIN_ACCEPTED = 50


@dataclass
class EngineStats:
    """Sums since the engine was made, or since its statistics were last reset.

    num_prompt_tokens: prompt tokens that were computed; num_cached_tokens: those that did not have to be.
    num_steps: decoding passes of the main model (prefill passes are not among them). num_decoded_tokens: tokens those
    passes gave; the first token of a sequence comes from its prefill. sequence_steps: the sequences in each of those
    passes, added up. offered, accepted: per head, drafts judged (those behind a rejected one are not) and found right.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    num_decoded_tokens: int = 0
    num_steps: int = 0
    sequence_steps: int = 0
    seconds: float = 0.0
    cache_bytes: int = 0
    all_global_cache_bytes: int = 0
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def count_drafts(self, num_offered: int, num_accepted: int) -> None:
        """One verification: of `num_offered` drafts the first `num_accepted` were right."""
        for head in range(min(num_accepted + 1, num_offered)):
            self.offered[head] += 1
            self.accepted[head] += head < num_accepted
        if num_offered and self.offered[0] == _DRAFTS_OF_A_CHECK and self.accepted[0] < _MIN_ACCEPTED:
            warnings.warn(
                f"of {self.offered[0]} drafts of the first MTP head {self.accepted[0]} were right, no more than by "
                "chance: the heads are untrained or not those of this model, and drafting only costs; use "
                "speculative=False.",
                stacklevel=2,
            )

    def observe_cache(self, arena: PageArena, sequences: list[RequestState]) -> None:
        """Keeps the peak of the bytes that running sequences hold, and what a model of full layers would have held."""
        cache_bytes = arena.page_bytes * sum(sequence.pages.num_pages for sequence in sequences)
        if cache_bytes > self.cache_bytes:
            self.cache_bytes = cache_bytes
            self.all_global_cache_bytes = sum(
                arena.all_global_bytes(sequence.num_computed_tokens) for sequence in sequences
            )

    def reset(self) -> None:
        """Starts counting anew."""
        self.__init__(offered=[0] * len(self.offered), accepted=[0] * len(self.accepted))

    def report(self) -> dict[str, float | int | list[float]]:
        """The numbers to read: see `LLM.stats`."""
        return {
            "accepted_tokens_per_step": self.num_decoded_tokens / max(self.sequence_steps, 1),
            "acceptance_by_head": [a / max(o, 1) for a, o in zip(self.accepted, self.offered, strict=True)],
            "cache_bytes": self.cache_bytes,
            "all_global_cache_bytes": self.all_global_cache_bytes,
            "tokens_per_second": self.num_new_tokens / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
            "num_steps": self.num_steps,
            "num_new_tokens": self.num_new_tokens,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
        }
