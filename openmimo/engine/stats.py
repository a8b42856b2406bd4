"""Counters of the engine."""

import warnings
from dataclasses import dataclass, field

from openmimo.engine.cache import PageArena
from openmimo.engine.request_state import RequestState

# Untrained heads, or heads loaded from the wrong tensors, have chance acceptance: the engine warns once.
_DRAFTS_OF_A_CHECK = 1000
_MIN_ACCEPTED = 50


@dataclass
class EngineStats:
    """Sums since the engine was made or its statistics were last reset.

    Attributes:
        num_prompt_tokens: Prompt tokens that were computed.
        num_cached_tokens: Prompt tokens that were reused.
        num_new_tokens: Tokens that were generated.
        num_decoded_tokens: Tokens from decoding passes. The first token of a sequence comes from its prefill.
        num_steps: Decoding passes of the main model, without prefill passes.
        sequence_steps: Sum over the decoding passes of their sequences.
        seconds: Wall time of the steps.
        cache_bytes: Peak bytes of the pages of running sequences, measured when a request ends.
        all_global_cache_bytes: Bytes at that moment in a model of full layers.
        offered: Per head, drafts that were judged; those after a rejected draft are not.
        accepted: Per head, drafts that were accepted.
        steps_by_drafts: `sequence_steps` by the number of drafts of the sequence.
        num_graphs: Captured graphs, since the engine was made.
        graph_seconds: Time of their capture.
        graph_bytes: Memory that their capture took.
        num_graph_passes: Passes of the main model that replayed a graph.
        num_other_passes: Passes of the main model that launched their kernels one by one.
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
    steps_by_drafts: list[int] = field(default_factory=list)
    num_graphs: int = 0
    graph_seconds: float = 0.0
    graph_bytes: int = 0
    num_graph_passes: int = 0
    num_other_passes: int = 0

    @classmethod
    def of_heads(cls, num_heads: int) -> "EngineStats":
        """Zeros for this many drafting heads."""
        return cls(offered=[0] * num_heads, accepted=[0] * num_heads, steps_by_drafts=[0] * (num_heads + 1))

    def count_drafts(self, num_offered: int, num_accepted: int) -> None:
        """Counts one verification, in which the first `num_accepted` of `num_offered` drafts were accepted."""
        self.steps_by_drafts[num_offered] += 1
        for head in range(min(num_accepted + 1, num_offered)):
            self.offered[head] += 1
            self.accepted[head] += head < num_accepted
        if num_offered and self.offered[0] == _DRAFTS_OF_A_CHECK and self.accepted[0] < _MIN_ACCEPTED:
            warnings.warn(
                f"{self.accepted[0]} of {self.offered[0]} drafts of the first MTP head were accepted, no more than by "
                "chance: the heads are untrained or belong to another model, and drafting only costs time; use "
                "speculative=False.",
                stacklevel=2,
            )

    def observe_cache(self, arena: PageArena, sequences: list[RequestState]) -> None:
        """Updates the peak of the bytes that `sequences` hold, and the bytes that a model of full layers would hold."""
        cache_bytes = arena.page_bytes * sum(sequence.held_pages.num_pages for sequence in sequences)
        if cache_bytes > self.cache_bytes:
            self.cache_bytes = cache_bytes
            self.all_global_cache_bytes = sum(
                arena.all_global_bytes(sequence.num_computed_tokens) for sequence in sequences
            )

    def reset(self) -> None:
        """Sets all counters to zero."""
        zero = EngineStats.of_heads(len(self.offered))
        zero.num_graphs, zero.graph_seconds, zero.graph_bytes = self.num_graphs, self.graph_seconds, self.graph_bytes
        vars(self).update(vars(zero))

    def report(self) -> dict[str, float | int | list[float] | list[int]]:
        """The statistics that `LLM.stats` describes."""
        return {
            "accepted_tokens_per_step": self.num_decoded_tokens / max(self.sequence_steps, 1),
            "acceptance_by_head": [a / max(o, 1) for a, o in zip(self.accepted, self.offered, strict=True)],
            "accepted_per_step_by_head": [a / max(self.sequence_steps, 1) for a in self.accepted],
            "steps_by_drafts": list(self.steps_by_drafts),
            "cache_bytes": self.cache_bytes,
            "all_global_cache_bytes": self.all_global_cache_bytes,
            "tokens_per_second": self.num_new_tokens / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
            "num_steps": self.num_steps,
            "num_new_tokens": self.num_new_tokens,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_graphs": self.num_graphs,
            "graph_seconds": self.graph_seconds,
            "graph_bytes": self.graph_bytes,
            "num_graph_passes": self.num_graph_passes,
            "num_other_passes": self.num_other_passes,
        }
