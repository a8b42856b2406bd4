"""Engine requests of the replies to one HTTP request."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace

from openmimo.core.records import Request, SamplingParams
from openmimo.engine.server.http.errors import invalid


def engine_requests(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    num_choices: int = 1,
    priority: int = 0,
    session: str | None = None,
) -> list[Request]:
    """Build `num_choices` requests for each prompt, in order.

    The seed of a choice depends only on the client's seed and on the index of the choice.

    Raises:
        ApiError: A session gets more than one reply.
    """
    if session is not None and len(prompts) * num_choices > 1:
        raise invalid("A session has one turn at a time; give one prompt and n: 1.", "session")
    shared = [tuple(prompt) for prompt in prompts]
    return [
        Request(
            id=secrets.token_hex(12),
            prompt_token_ids=prompt,
            params=replace(params, seed=derived_seed(params.seed, choice)),
            priority=priority,
            session=session,
        )
        for prompt in shared
        for choice in range(num_choices)
    ]


def derived_seed(seed: int | None, choice: int) -> int | None:
    """The seed of a choice, from the client's seed and the index of the choice."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
