"""How many tokens a request has read and written, as OpenAI counts them."""

from typing import Any


def usage(
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    num_cached_tokens: int,
    num_reasoning_tokens: int,
    num_drafted_tokens: int,
) -> dict[str, Any]:
    """The usage object of completions and chats. accepted_prediction_tokens: tokens that MTP heads had drafted."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": num_reasoning_tokens,
            "accepted_prediction_tokens": num_drafted_tokens,
        },
    }
