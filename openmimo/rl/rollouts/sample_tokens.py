"""The tokens of a sample while it is rolled out: the prompt, the turns of the policy, and what the episode inserts.

No text of the policy is ever tokenized again: the ids that were sampled are the ids that are trained on.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from openmimo.core.errors import ConfigError
from openmimo.core.records import Completion, Message
from openmimo.core.samples import Sample
from openmimo.data.chat.template import encode_chat
from openmimo.data.tokenizer import THINK_END, THINK_START, Tokenizer
from openmimo.rl.scheduling.groups import GroupRequest

NOT_SAMPLED = -1  # the version of tokens that the policy did not write


def new_sample(prompt_ids: list[int], request: GroupRequest, sample_id: str) -> Sample:
    """A sample of a request that has only its prompt."""
    length = len(prompt_ids)
    return Sample(
        token_ids=np.asarray(prompt_ids, np.int32),
        loss_mask=np.zeros(length, bool),
        logprobs=np.zeros(length),
        versions=np.full(length, NOT_SAMPLED),
        domain=request.source,
        group=request.group_id,
        temperature=request.temperature,
        info={"sample_id": sample_id, "problem": request.problem.id},
    )


def with_completion(sample: Sample, completion: Completion) -> Sample:
    """The sample with the new tokens of the engine. Routes that it has already stay those of the pass that sampled."""
    assert completion.logprobs is not None, "rollouts request log-probabilities"
    routes = completion.routed_experts
    earlier_routes = sample.routes
    if routes is not None and earlier_routes is not None:
        routes = np.concatenate([earlier_routes, routes[len(earlier_routes) :]])
    longer = _with_tokens(
        sample, completion.token_ids, completion.logprobs, completion.policy_versions, is_written=True
    )
    longer.routed_experts = routes
    return longer


def with_inserted(sample: Sample, token_ids: list[int]) -> Sample:
    """The sample with tokens that the policy reads and did not write."""
    count = len(token_ids)
    if not count:
        return sample
    return _with_tokens(sample, token_ids, np.zeros(count), np.full(count, NOT_SAMPLED), is_written=False)


def _with_tokens(
    sample: Sample,
    token_ids: list[int],
    logprobs: Sequence[float] | np.ndarray,
    versions: Sequence[int] | np.ndarray,
    *,
    is_written: bool,
) -> Sample:
    return replace(
        sample,
        token_ids=np.concatenate([sample.token_ids, np.asarray(token_ids, np.int32)]),
        loss_mask=np.concatenate([sample.loss_mask, np.full(len(token_ids), is_written)]),
        logprobs=np.concatenate([sample.logprobs, np.asarray(logprobs, np.float64)]),
        versions=np.concatenate([sample.versions, np.asarray(versions, np.int32)]),
    )


def without_thoughts(text: str, *, stop: tuple[str, ...] = ()) -> str:
    """A policy turn without its thoughts; empty if they were cut off. Text that ends in a stop string is unchanged."""
    _, end, response = text.partition(THINK_END)
    if end:
        return response
    has_stopped = any(text.endswith(ending) for ending in stop)
    return "" if text.startswith(THINK_START) and not has_stopped else text


def turn_ids(tokenizer: Tokenizer, messages: tuple[Message, ...], *, enable_thinking: bool = False) -> list[int]:
    """The ids of messages that follow a policy turn, up to the next one, without the end of the turn before them.

    Raises:
        ConfigError: The chat template changes earlier turns when later ones follow.
    """
    before = [Message("system"), Message("user", "x"), Message("assistant", "y")]
    prefix = encode_chat(tokenizer, before, add_generation_prompt=False, enable_thinking=enable_thinking)
    whole = encode_chat(tokenizer, [*before, *messages], enable_thinking=enable_thinking)
    if whole[: len(prefix)] != prefix:
        raise ConfigError(
            "the chat template changes earlier turns when later ones follow; it cannot be used for rollouts."
        )
    return whole[len(prefix) :]
