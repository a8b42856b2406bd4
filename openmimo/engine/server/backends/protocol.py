"""The interface between the server and the source of its tokens."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from openmimo.core.records import Delta, Request
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class BackendGauges:
    """The state of a backend at one moment. Token and draft counts are totals since its start.

    Attributes:
        num_waiting: Requests in the queue.
        num_running: Requests in the batch.
        cache_bytes_used: Bytes of the KV cache held by requests.
        cache_bytes_total: Size of the KV cache.
        num_prompt_tokens: Tokens of accepted prompts.
        num_cached_tokens: Those prompt tokens that were found in the prefix cache.
        num_new_tokens: Generated tokens.
        drafts_offered: Verified drafts by position; index 0 is the first draft of a step.
        drafts_accepted: Accepted drafts by position.
        steps_by_drafts: Decoding steps of all sequences, by the number of drafts that each verified.
        num_graphs: Captured graphs of an accelerator.
        graph_seconds: Time of their capture.
        graph_bytes: Memory that their capture took.
        num_graph_passes: Passes that replayed a graph.
        num_other_passes: Passes that did not.
        seconds_heard: Sound in the prompts of a speech model.
        seconds_spoken: Sound that it generated.
        num_ranks: Devices, or processes on CPUs, that share the model.
        is_healthy: Whether the backend accepts requests.
    """

    num_waiting: int = 0
    num_running: int = 0
    cache_bytes_used: int = 0
    cache_bytes_total: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    drafts_offered: tuple[int, ...] = ()
    drafts_accepted: tuple[int, ...] = ()
    steps_by_drafts: tuple[int, ...] = ()
    num_graphs: int = 0
    graph_seconds: float = 0.0
    graph_bytes: int = 0
    num_graph_passes: int = 0
    num_other_passes: int = 0
    seconds_heard: float = 0.0
    seconds_spoken: float = 0.0
    num_ranks: int = 1
    is_healthy: bool = True


class Backend(Protocol):
    """Generates replies. All methods except `check` are called on the event loop's thread.

    Attributes:
        model_name: Default model name in the API.
        model_aliases: Other names of the model that requests may use.
        tokenizer: The model's tokenizer.
        max_positions: Maximum number of tokens of prompt plus reply.
    """

    model_name: str
    model_aliases: tuple[str, ...]
    tokenizer: Tokenizer
    max_positions: int

    def check(self, request: Request) -> None:
        """Raise UserError if the request can never run (too long, an id out of range, an invalid structure).

        Must be thread-safe.
        """

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the reply, one delta for each step that adds to it. The last delta has a finish_reason.

        Closing the iterator aborts the request and frees its cache pages.
        """

    def gauges(self) -> BackendGauges:
        """Return the current state for /metrics and /health."""

    async def close(self) -> None:
        """Abort running requests and release all resources."""
