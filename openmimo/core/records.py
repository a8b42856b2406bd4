"""Plain records that the command line, the engine, the server and the trainers exchange."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, Fraction, NonNegativeInt, PositiveInt, Seed, check_fields

_MIN_TEMPERATURE = 1e-5
POOLINGS = ("", "mean", "last")
STRUCTURE_KINDS = ("json_object", "json_schema", "regex", "grammar")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, with OpenAI's field names.

    Attributes:
        role: Role of the speaker, such as "user".
        content: Text of the turn.
        reasoning_content: Reasoning before the content.
        tool_calls: Dicts with `name` and `arguments` (a dict).
    """

    role: str
    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "Message")


@dataclass(frozen=True)
class Structure:
    """A constraint on the form of a generated text.

    Attributes:
        kind: One of STRUCTURE_KINDS.
        source: JSON schema, regular expression or Lark grammar; empty for "json_object".
        prefix: Regular expression of a text that comes first, such as thinking. It ends with its first match.
        alternative: Regular expression of a text that may take the place of the form, such as tool calls.
    """

    kind: str
    source: str = ""
    prefix: str = ""
    alternative: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "Structure")
        if self.kind not in STRUCTURE_KINDS:
            raise ConfigError(f"Structure.kind is {self.kind!r}; it must be one of {', '.join(STRUCTURE_KINDS)}.")
        if bool(self.source) == (self.kind == "json_object"):
            raise ConfigError(
                f"Structure of kind {self.kind!r} "
                + ("takes no source." if self.source else "needs a source (a schema, pattern or grammar).")
            )


_Rules = Mapping[str, tuple[bool, str]]  # by field: whether its value is valid, and what it must be


@dataclass(frozen=True)
class TextParams:
    """The sampling parameters that determine the text of a reply.

    Processing follows the order of the fields. Biases and penalties change the logits, and temperature scales them.
    Then top_k, top_p and min_p truncate the distribution, each based on the probabilities before any truncation.

    Attributes:
        max_tokens: Maximum number of new tokens.
        min_tokens: Minimum number of new tokens. Before it, stop ids have probability 0 and stop strings are ignored.
        logit_bias: Values added to the logits of token ids.
        repetition_penalty: Divides the positive logits of all tokens in prompt and text, and multiplies negative ones.
        presence_penalty: Subtracted from the logit of every token in the generated text.
        frequency_penalty: Subtracted from a token's logit once per occurrence in the generated text.
        temperature: Divides the logits; 0 is greedy.
        top_p: Keep the smallest set of tokens with at least this total probability.
        top_k: Maximum number of tokens to keep (0: no limit).
        min_p: Keep tokens with at least this fraction of the highest probability.
        seed: Makes the text reproducible, alone and in every batch; None draws a seed. docs/engine.md states limits.
        stop: The text ends before the first of these strings. A single string is also accepted.
        stop_token_ids: The text ends after the first of these ids, in addition to the checkpoint's stop ids.
        ignore_eos: Continue after the checkpoint's stop ids.
        max_repeats: End (finish reason "repetition") after this number of consecutive repetitions of a passage of at
            most 64 tokens (0: never).
        structure: Constraint on the form of the text.
        skip_special_tokens: Omit special tokens from the text.
    """

    max_tokens: PositiveInt = 128
    min_tokens: NonNegativeInt = 0
    logit_bias: Mapping[NonNegativeInt, Annotated[float, Bounds(least=-100, most=100)]] = field(default_factory=dict)
    repetition_penalty: Annotated[float, Bounds(least=0.01, most=100)] = 1.0
    presence_penalty: Annotated[float, Bounds(least=-2, most=2)] = 0.0
    frequency_penalty: Annotated[float, Bounds(least=-2, most=2)] = 0.0
    temperature: Annotated[float, Bounds(least=0)] = 1.0
    top_p: Annotated[float, Bounds(above=0, most=1)] = 1.0
    top_k: NonNegativeInt = 0
    min_p: Fraction = 0.0
    seed: Seed | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    ignore_eos: bool = False
    max_repeats: NonNegativeInt = 0
    structure: Structure | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_fields(self, "SamplingParams")
        rules: _Rules = {
            "min_tokens": (self.min_tokens <= self.max_tokens, f"at most max_tokens ({self.max_tokens})"),
            "temperature": (
                self.temperature == 0.0 or self.temperature >= _MIN_TEMPERATURE,
                f"0 (greedy), or at least {_MIN_TEMPERATURE:.5f}",
            ),
            "stop": (all(self.stop), "without empty strings"),
            "max_repeats": (self.max_repeats != 1, "0 (never) or at least 2"),
        }
        self._check(rules)

    def _check(self, rules: _Rules) -> None:
        for name, (good, expected) in rules.items():
            if not good:
                raise ConfigError(f"SamplingParams.{name} is {getattr(self, name)!r}; it must be {expected}.")

    @property
    def has_filters(self) -> bool:
        """Whether the distribution is truncated."""
        return self.top_p != 1.0 or self.top_k > 0 or self.min_p > 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether the distribution depends on more than the model's logits and the temperature."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.min_tokens
            or self.structure
        )


@dataclass(frozen=True)
class SamplingParams(TextParams):
    """Sampling parameters of one request: those of the text, and the values to return with it.

    Attributes:
        logprobs: Return the log-probability of each new token at the sampling temperature, before biases, penalties
            and truncation (for temperature 0: at temperature 1).
        top_logprobs: Number of most likely tokens to return at each position.
        prompt_logprobs: Return the log-probabilities of the prompt's tokens.
        prompt_top_logprobs: Return this many of the likeliest tokens at each position of the prompt as well; requires
            prompt_logprobs.
        pooling: Return an embedding of the prompt: the "mean" of the final states of its tokens, or that of the "last"
            token. Empty: none.
        routed_experts: Return the experts that each token was routed to.
    """

    logprobs: bool = False
    top_logprobs: Annotated[int, Bounds(least=0, most=20)] = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: Annotated[int, Bounds(least=0, most=20)] = 0
    pooling: str = ""
    routed_experts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            {
                "prompt_top_logprobs": (
                    self.prompt_logprobs or not self.prompt_top_logprobs,
                    "0 without prompt_logprobs",
                ),
                "pooling": (self.pooling in POOLINGS, f"one of {', '.join(map(repr, POOLINGS))}"),
            }
        )

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether every position of the prompt must be computed, so that no cached prefix can be used."""
        return self.prompt_logprobs or bool(self.pooling)


@dataclass(frozen=True)
class Request:
    """One prompt for the engine.

    Attributes:
        id: Unique among the running requests.
        prompt_token_ids: The prompt.
        params: The sampling parameters.
        priority: Requests with a lower value run first.
        session: Requests of one session (turns of a rollout) reuse each other's cache and routed experts, and share
            none with other requests. None shares prefixes with all requests without a session.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    session: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the most likely (id, log-probability) pairs at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """The output of one engine step for one request.

    Attributes:
        request_id: Id of the request.
        token_ids: New tokens.
        text: New text. It may lag behind the tokens, because the start of a stop string or character is held back.
        logprobs: Log-probabilities of the new tokens, if requested.
        drafted: For each new token, whether an MTP head drafted it.
        finish_reason: "" while the request runs, then "stop", "length", "repetition", "abort" or "error".
        error: The error message.
        is_request_error: Whether the request caused the error (e.g. by a structure that cannot be satisfied).
        num_prompt_tokens: Length of the prompt.
        num_cached_tokens: Prompt tokens that were reused from the cache.
        prompt_logprobs: Log-probabilities of the prompt's tokens, if requested.
        embedding: The pooled states of the prompt, if requested; in the first delta only, as prompt_logprobs.
        stop_string: The stop string that ended the text, or empty.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    drafted: tuple[bool, ...] = ()
    finish_reason: str = ""
    error: str = ""
    is_request_error: bool = False
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()
    stop_string: str = ""

    @property
    def has_output(self) -> bool:
        """Whether the delta adds to the reply."""
        return bool(self.token_ids)

    @property
    def num_new_tokens(self) -> int:
        """Number of tokens that the delta adds."""
        return len(self.token_ids)


@dataclass
class Completion:
    """The result of one request.

    Attributes:
        prompt_token_ids: The prompt.
        token_ids: New tokens.
        text: Their text.
        logprobs: Log-probabilities of the new tokens; None if not requested.
        finish_reason: As in `Delta`.
        top_logprobs: For each new token, the most likely (id, log-probability) pairs; None if not requested.
        prompt_logprobs: Log-probabilities of the prompt's tokens except the first; None if not requested.
        prompt_top_logprobs: For each prompt token except the first, the most likely pairs; None if not requested.
        embedding: The pooled states of the prompt; None if not requested.
        policy_versions: For each new token, the version of the weights that sampled it.
        drafted: For each new token, whether an MTP head drafted it.
        routed_experts: NumPy array [prompt and new tokens - 1, sparse layers, experts per token], uint8 for up to 256
            experts, else int16; None if not requested.
        num_cached_tokens: Prompt tokens that were reused from the cache.
        error: As in `Delta`.
        steps_by_drafts: Decoding steps by the number of drafts that they verified; empty without MTP heads.
        accepted_by_head: Accepted drafts of each MTP head.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] | None = None
    finish_reason: str = ""
    top_logprobs: list[tuple[tuple[int, float], ...]] | None = None
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: list[tuple[tuple[int, float], ...]] | None = None
    embedding: list[float] | None = None
    policy_versions: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    routed_experts: Any = None
    num_cached_tokens: int = 0
    error: str = ""
    steps_by_drafts: list[int] = field(default_factory=list)
    accepted_by_head: list[int] = field(default_factory=list)
