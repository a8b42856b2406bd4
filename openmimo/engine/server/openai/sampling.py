"""Conversion of request fields to `SamplingParams`."""

import json
import re

from openmimo.core.records import SamplingParams, Structure
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.errors import invalid
from openmimo.engine.server.openai.schema import ChatRequest, CommonFields, ResponseFormat, StructuredOutputs

_SAME_NAME = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_p",
    "min_tokens", "ignore_eos", "max_repeats",
)  # fmt: skip


def sampling_params(
    fields: CommonFields,
    *,
    max_tokens: int,
    structure: Structure | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    prompt_logprobs: int | None = None,
    skip_special_tokens: bool = False,
) -> SamplingParams:
    """Build the sampling parameters of a request. Absent fields have the defaults of `SamplingParams`.

    Args:
        fields: The request.
        max_tokens: Maximum number of new tokens.
        structure: Required form of the text.
        logprobs: Whether to return the log-probabilities of new tokens.
        top_logprobs: Number of likeliest tokens at each new position.
        prompt_logprobs: Number of likeliest tokens at each position of the prompt; None if the prompt is not scored.
        skip_special_tokens: Default of the field of that name.

    Raises:
        ApiError: min_tokens exceeds `max_tokens`.
    """
    if (fields.min_tokens or 0) > max_tokens:
        raise invalid(f"min_tokens is {fields.min_tokens}, which exceeds the limit of {max_tokens}.", "min_tokens")
    copied = {name: getattr(fields, name) for name in _SAME_NAME if getattr(fields, name) is not None}
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    return SamplingParams(
        max_tokens=max_tokens,
        top_k=max(fields.top_k or 0, 0),
        seed=None if fields.seed is None else fields.seed % 2**63,
        stop=tuple(stop),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        logit_bias={int(key): bias for key, bias in (fields.logit_bias or {}).items()},
        structure=structure,
        skip_special_tokens=skip_special_tokens if fields.skip_special_tokens is None else fields.skip_special_tokens,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs is not None,
        prompt_top_logprobs=prompt_logprobs or 0,
        **copied,
    )


def token_limit(requested: int | None, default: int, most: int) -> int:
    """Return the maximum number of new tokens: the requested or the default number, but no more than `most`."""
    return min(default if requested is None else requested, most)


def chat_token_limit(body: ChatRequest, most: int) -> int:
    """Return the maximum number of new tokens of a chat, at most `most`. Raises ApiError if its two limits differ."""
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise invalid("max_tokens and max_completion_tokens contradict each other; give one.", "max_tokens")
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return token_limit(requested, most, most)


def structure_of(fields: CommonFields, response_format: ResponseFormat | None = None) -> Structure | None:
    """Return the structure of the reply, from structured_outputs or response_format, or None.

    Raises:
        ApiError: Both fields set a structure.
    """
    format_structure = _of_response_format(response_format)
    if fields.structured_outputs is None:
        return format_structure
    if format_structure is not None:
        raise invalid("structured_outputs and response_format both constrain the text.", "structured_outputs")
    return _of_structured_outputs(fields.structured_outputs)


def structure_field(fields: CommonFields, format_field: str) -> str:
    """The field that contains the structure. `format_field` is the endpoint's name of its response format."""
    return format_field if fields.structured_outputs is None else "structured_outputs"


def _of_response_format(response_format: ResponseFormat | None) -> Structure | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is None:
        return Structure("json_object")
    return Structure("json_schema", json.dumps(response_format.json_schema.json_schema))


def _of_structured_outputs(outputs: StructuredOutputs) -> Structure:
    if outputs.json_schema is not None:
        return Structure("json_schema", json.dumps(outputs.json_schema))
    if outputs.regex is not None:
        return Structure("regex", outputs.regex)
    if outputs.grammar is not None:
        return Structure("grammar", outputs.grammar)
    pattern = "|".join(re.escape(choice) for choice in outputs.choice or ())
    if len(pattern) > limits.STRUCTURE_CHARACTERS:
        raise invalid(
            f"The choices have more than {limits.STRUCTURE_CHARACTERS} characters.", "structured_outputs.choice"
        )
    return Structure("regex", pattern)
