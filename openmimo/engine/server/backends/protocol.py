"""What the server needs of whatever makes the tokens."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from openmimo.core.records import Delta, Request
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class BackendGauges:
    """The state of a backend at one moment; all but the first four are sums since its start.

    num_waiting, num_running: requests. cache_bytes_used, cache_bytes_total: of the key/value cache.
    num_prompt_tokens: of accepted prompts; num_cached_tokens: those of them that were not computed anew.
    num_new_tokens: tokens generated. drafts_offered, drafts_accepted: by position, the first draft of a step first.
    is_healthy: whether requests can still be answered.
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
    is_healthy: bool = True


class Backend(Protocol):
    """Makes tokens. All but `check` is called on the event loop's thread.

    model_name: what clients call it. max_positions: tokens of prompt and reply together, at most.
    """

    model_name: str
    tokenizer: Tokenizer
    max_positions: int

    def check(self, request: Request) -> None:
        """Raises UserError if the request can never run (too long, an id out of range, a bad structure).

        Called from several threads at once.
        """

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The reply as it grows; the last delta has a finish_reason. Closing the iterator aborts the request."""

    def gauges(self) -> BackendGauges:
        """What /metrics and /health report."""

    async def close(self) -> None:
        """Ends what runs and gives everything back."""
