"""What an engine may use, without torch."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from openmimo.core.errors import ConfigError
from openmimo.core.fields import PositiveFloat, PositiveInt, check_fields

_PROMPT_TOKENS = {True: (1024, 256), False: (8192, 2048)}  # on a CPU and not: alone, and among decoding texts
WeightFormat: TypeAlias = Literal["plain", "int8", "fp8", "fairy2i", "fairy", "ternary", "binary"]


def chosen_format(weights: WeightFormat, *, int8: bool) -> WeightFormat:
    """The format of `weights`, or int8 by its earlier option. Raises ConfigError if the two contradict each other."""
    if int8 and weights not in ("plain", "int8"):
        raise ConfigError(f"int8 means weights=int8, but weights is {weights}; give one of the two.")
    return "int8" if int8 else weights


@dataclass(frozen=True)
class EngineConfig:
    """How an engine batches, what it remembers, and how it drafts.

    Attributes:
        max_sequences: Requests that run at once; the others wait.
        prefill_tokens: Prompt tokens that one step reads at most. auto: 1,024 on a CPU and 8,192 on an accelerator.
        mixed_prefill_tokens: The same for a step in which others decode: how long their next token may wait. auto: 256
            on a CPU and 2,048 on an accelerator. all: as many as `prefill_tokens`.
        cache_gigabytes: Memory for keys and values (none: what max_sequences of the longest texts need, and at most
            40 % of what is free).
        cache_dtype: Of stored keys and values: auto (that of the activations, or int8 with attention in int8), float32,
            bfloat16, float16, fp8, or int8 (a scale for each key and value). With one narrower than the activations,
            texts depend on chunk sizes and prefix hits.
        attention: Products of full layers in prompts: exact, int8 (of queries and keys, and of probabilities and
            values), or int8_half (of queries and keys). Decoding multiplies what the cache holds.
        page_positions: Positions that a cache page holds of layers that keep all of them: a power of two from 16 to
            128. Sliding layers may get fewer, at least 16. Prompts share whole pages only.
        prefix_cache: Reuse what requests with the same beginning computed.
        speculative: Draft with the MTP heads (none: wherever there are some).
        num_drafts: MTP heads that draft (none: all).
        adaptive_drafts: Use fewer heads while they do not pay.
        graphs: Replay captured graphs in decoding on an accelerator, where Triton is installed. No
            effect with tp > 1.
        plans_ahead: Plan a step while an accelerator computes the last one. A text that a token or a stop string ends
            is then computed for one step more, whose token is dropped. No effect with tp > 1.
        tp: Devices (or processes on CPUs) that share every layer of the model. Each holds a part of the weights and of
            the cache.
        ep: With tp, each holds all of some experts instead of a part of every expert.
    """

    max_sequences: PositiveInt = 64
    prefill_tokens: PositiveInt | Literal["auto"] = "auto"
    mixed_prefill_tokens: PositiveInt | Literal["auto", "all"] = "auto"
    cache_gigabytes: PositiveFloat | None = None
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8"] = "auto"
    attention: Literal["exact", "int8", "int8_half"] = "exact"
    page_positions: Literal[16, 32, 64, 128] = 32
    prefix_cache: bool = True
    speculative: bool | None = None
    num_drafts: PositiveInt | None = None
    adaptive_drafts: bool = True
    graphs: bool = True
    plans_ahead: bool = True
    tp: PositiveInt = 1
    ep: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "EngineConfig")
        if self.ep and self.tp == 1:
            raise ConfigError("ep divides the experts among the ranks of tp, but tp is 1; give a larger tp, or no ep.")
        if self.num_drafts is not None and self.speculative is False:
            raise ConfigError(
                f"num_drafts is {self.num_drafts}, which has no effect with speculative=False; give one of the two."
            )

    @property
    def integers(self) -> Literal["full", "half"] | None:
        """The products of full layers that prompts compute in int8."""
        names: dict[str, Literal["full", "half"]] = {"int8": "full", "int8_half": "half"}
        return names.get(self.attention)

    def drafts_for(self, num_heads: int) -> int:
        """How many heads of a model with `num_heads` draft. Raises ConfigError where that contradicts the model."""
        if self.speculative and not num_heads:
            raise ConfigError(
                "speculative=True, but the model has no MTP heads to draft with; use speculative=False, or a "
                "checkpoint with heads."
            )
        if self.num_drafts is not None and not 1 <= self.num_drafts <= num_heads:
            raise ConfigError(
                f"num_drafts is {self.num_drafts}; the model has {num_heads} MTP heads, so it must be 1 to {num_heads}."
            )
        if self.speculative is False:
            return 0
        return num_heads if self.num_drafts is None else self.num_drafts

    def prompt_tokens(self, *, on_cpu: bool) -> tuple[int, int]:
        """`prefill_tokens` and `mixed_prefill_tokens` as numbers."""
        alone, mixed = _PROMPT_TOKENS[on_cpu]
        if self.prefill_tokens != "auto":
            alone = self.prefill_tokens
        if self.mixed_prefill_tokens == "all":
            return alone, alone
        return alone, mixed if self.mixed_prefill_tokens == "auto" else self.mixed_prefill_tokens
