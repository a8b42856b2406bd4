"""The plain records that cross every border: between the command line, the engine, the server and trainers."""

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
    """One turn of a conversation, in OpenAI's words. `tool_calls` are dicts with `name` and `arguments` (a dict)."""

    role: str
    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "Message")


@dataclass(frozen=True)
class Structure:
    """The required form of a text.

    Attributes:
        kind: One of STRUCTURE_KINDS.
        source: The schema (JSON), regular expression or Lark grammar; empty for json_object.
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


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded.

    The order of the steps is that of the fields: biases and penalties change the logits, then temperature, then top_k,
    top_p and min_p cut the distribution, all three by the probabilities before any cut.

    Attributes:
        max_tokens: New tokens, at most.
        min_tokens: New tokens, at least: until then no stop id can be chosen and no stop string ends the text.
        logit_bias: Added to the logits of these token ids.
        repetition_penalty: Above 1, makes tokens of the prompt and of the text less likely (positive logits are divided
            by it, negative ones multiplied).
        presence_penalty: Subtracted from the logit of every token that the text already has.
        frequency_penalty: Subtracted from a token's logit once for each time the text already has it.
        temperature: Flattens or sharpens the distribution; 0 is greedy.
        top_p: Keep the smallest set of tokens with this much probability.
        top_k: Keep at most so many tokens (0: no limit).
        min_p: Keep only tokens at least this fraction as likely as the likeliest.
        seed: Same seed, same text, alone and in every batch; None draws one. See docs/engine.md for the limits of this.
        stop: End before one of these strings (one string may be given alone).
        stop_token_ids: End after one of these ids, beside the checkpoint's own.
        ignore_eos: Go on after the checkpoint's end-of-text ids.
        max_repeats: End (finish reason "repetition") once the text closes with one passage of at most 64 tokens so many
            times in a row (0: never).
        structure: The text must be of this form.
        skip_special_tokens: Leave special tokens out of the text.
        logprobs: Return the log-probability of each new token under the raw distribution at the sampling temperature
            (before biases, penalties and cuts; at temperature 0, that of temperature 1).
        top_logprobs: Return so many of the likeliest tokens at each position too.
        prompt_logprobs: Return the log-probabilities of the prompt's tokens.
        prompt_top_logprobs: Return this many of the likeliest tokens at each position of the prompt as well; requires
            prompt_logprobs.
        pooling: Return an embedding of the prompt: the "mean" of the final states of its tokens, or that of the "last"
            token. Empty: none.
        routed_experts: Return the experts that each token was routed to.
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
    logprobs: bool = False
    top_logprobs: Annotated[int, Bounds(least=0, most=20)] = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: Annotated[int, Bounds(least=0, most=20)] = 0
    pooling: str = ""
    routed_experts: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_fields(self, "SamplingParams")
        rules = {
            "min_tokens": (self.min_tokens <= self.max_tokens, f"at most max_tokens ({self.max_tokens})"),
            "temperature": (
                self.temperature == 0.0 or self.temperature >= _MIN_TEMPERATURE,
                f"0 (greedy), or at least {_MIN_TEMPERATURE:.5f}",
            ),
            "stop": (all(self.stop), "without empty strings"),
            "max_repeats": (self.max_repeats != 1, "0 (never) or at least 2"),
            "prompt_top_logprobs": (self.prompt_logprobs or not self.prompt_top_logprobs, "0 without prompt_logprobs"),
            "pooling": (self.pooling in POOLINGS, f"one of {', '.join(map(repr, POOLINGS))}"),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise ConfigError(f"SamplingParams.{name} is {getattr(self, name)!r}; it must be {expected}.")

    @property
    def changes_logits(self) -> bool:
        """Whether the choice depends on more than the model's own logits."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.min_tokens
            or self.structure
        )

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether every position of the prompt must be computed, so that no cached prefix can be used."""
        return self.prompt_logprobs or bool(self.pooling)


@dataclass(frozen=True)
class Request:
    """One prompt for the engine.

    id: unique among the running ones. priority: lower runs first. session: requests of one session (turns of one
    rollout) reuse each other's cache and routed experts, and share nothing with others; None shares prefixes freely.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    session: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the likeliest (id, log-probability) pairs at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What one engine step added to one request.

    drafted: for each new token, whether an MTP head had proposed it. text may lag behind the ids: text that may be the
    start of a stop string or of a character is held back. finish_reason: "" while it runs, then "stop", "length",
    "repetition", "abort" or "error" (with `error`). is_request_error: whether the request is to blame for the error (a
    structure that cannot be followed), and not the engine. num_cached_tokens: prompt tokens that were reused.
    prompt_logprobs: of the prompt's tokens but the first; embedding: the pooled states of the prompt. Both are in the
    first delta only.
    stop_string: the stop string that ended the text, or empty.
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


@dataclass
class Completion:
    """What came of one request.

    finish_reason, error: as in Delta. logprobs: of the new tokens, if asked for; top_logprobs: for each, the
    likeliest (id, log-probability) pairs. prompt_logprobs, prompt_top_logprobs: the same of the prompt's tokens but the
    first. embedding: the pooled states of the prompt, if requested. policy_versions: for each new token, the version of
    the weights that chose it. drafted: for each, whether an MTP head had proposed it. routed_experts: a NumPy array
    [prompt and new tokens but the last, sparse layers, experts a token], uint8 up to 256 experts, else int16.
    num_cached_tokens: prompt tokens that were reused.
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
