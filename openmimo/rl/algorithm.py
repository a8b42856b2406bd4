"""The interface of RL algorithms. Each is a file in `openmimo/rl/algorithms` that exports `PLUGIN`, an Algorithm.

An algorithm annotates samples with the advantage and the weight of each token, and computes the loss of each token; the
trainer does the rest. Settings are frozen dataclasses of plain values. This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from openmimo.core.config import from_dict
from openmimo.core.errors import ConfigError
from openmimo.core.fields import NonNegativeFloat, NonNegativeInt, PositiveInt, check_fields, renamed_keys
from openmimo.core.registry import Registry
from openmimo.core.samples import Sample
from openmimo.rl.config import MopdConfig, RlConfig

if TYPE_CHECKING:
    import torch

    from openmimo.rl.losses.tokens import TokenBatch

CORRECTION_LIMITS: dict[str, dict[str, float]] = {
    "none": {},
    "tis": {"high": 2.0},
    "icepop": {"low": 0.5, "high": 2.0},
    "clip": {"low": 0.5, "high": 2.0},
    "sequence_mask": {"low": 0.99, "high": 1.01},
    "sequence_tis": {"high": 5.0},
    "staleness_tis": {"low": 0.0, "high": 2.0, "decay": 0.5, "max_staleness": 4},
}


@dataclass(frozen=True)
class Correction:
    """The correction for the difference between trainer and engine (`losses/corrections.py`).

    Attributes:
        kind: none; tis: min(ratio, high); icepop: the ratio if within [low, high], else 0; clip: the ratio clipped to
            [low, high]; sequence_mask: drop sequences with a geometric mean ratio outside [low, high]; sequence_tis:
            min(ratio of the sequence, high); staleness_tis: like tis, with a limit that falls with the token's age.
        low: Lower limit (None: the default of the kind, as for all below). A limit that the kind does not use is an
            error.
        high: Upper limit.
        decay: The factor by which each version of age reduces high - 1.
        max_staleness: The age in versions above which tokens are dropped.
        veto_below: Drop sequences in which the ratio of any token is below this, such as 1e-4 (0: none).
    """

    kind: Literal["none", "tis", "icepop", "clip", "sequence_mask", "sequence_tis", "staleness_tis"] = "none"
    low: NonNegativeFloat | None = None
    high: NonNegativeFloat | None = None
    decay: NonNegativeFloat | None = None
    max_staleness: NonNegativeInt | None = None
    veto_below: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "correction")
        used = CORRECTION_LIMITS[self.kind]
        for name in ("low", "high", "decay", "max_staleness"):
            if vars(self)[name] is not None and name not in used:
                raise ConfigError(f"correction.{name} has no effect with kind {self.kind!r}; leave it out.")
        limits = self.limits()
        if not 0 <= limits.get("low", 0.0) < limits.get("high", 1.0) or self.veto_below < 0:
            raise ConfigError(f"{self} needs 0 <= low < high, and veto_below of 0 or more.")
        if self.kind == "staleness_tis" and not (
            limits["high"] >= 1 and 0 <= limits["decay"] <= 1 and limits["max_staleness"] >= 0
        ):
            raise ConfigError(f"{self} needs high of 1 or more, decay from 0 to 1, and max_staleness of 0 or more.")

    def limits(self) -> dict[str, float]:
        """The limits that this kind uses, by name."""
        defaults = CORRECTION_LIMITS[self.kind]
        return {name: default if vars(self)[name] is None else vars(self)[name] for name, default in defaults.items()}

    @property
    def is_gate(self) -> bool:
        """Whether it only drops tokens, and never multiplies by the ratio."""
        return self.kind in ("none", "sequence_mask")


@renamed_keys({"normalisation": "normalization"})
@dataclass(frozen=True)
class PolicyOptions:
    """Settings of every algorithm that learns from rewards.

    Attributes:
        normalization: The weight of a token: token (equal for all tokens of the step), sequence (equal sums for all
            responses), or constant (1 / (responses * max_answer_tokens)).
        max_answer_tokens: Only with constant (None: the longest response of the step; set the limit of the rollouts for
            an equal weight in all steps).
        correction: The correction for the difference between trainer and engine.
    """

    normalization: Literal["token", "sequence", "constant"] = "token"
    max_answer_tokens: PositiveInt | None = None
    correction: Correction = Correction("tis")

    def __post_init__(self) -> None:
        check_fields(self, "algorithm_options")
        if self.max_answer_tokens is not None and self.normalization != "constant":
            raise ConfigError("max_answer_tokens has no effect unless normalization is 'constant'; leave it out.")


@dataclass(frozen=True)
class RatioOptions(PolicyOptions):
    """Settings of algorithms with a policy ratio.

    Attributes:
        old_policy: decoupled: the ratio is π_θ / π_old, and `correction` weighs π_old / μ; bypass: the ratio is π_θ / μ
            and only the corrections "none" and "sequence_mask" are allowed, as others would count the difference twice.
    """

    old_policy: Literal["decoupled", "bypass"] = "decoupled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.old_policy == "bypass" and not self.correction.is_gate:
            raise ConfigError(
                f"old_policy 'bypass' has π / μ in its ratio; correction {self.correction.kind!r} would multiply by it "
                "again. Set correction.kind to 'none' (or 'sequence_mask'), or old_policy to 'decoupled'."
            )


Annotate = Callable[[list[Sample], Any, Sequence[Any]], None]


@dataclass(frozen=True)
class Algorithm:
    """One way to learn from samples.

    Attributes:
        describe: One line of description.
        options: The frozen dataclass of its settings, with a field `correction`.
        annotate: annotate(samples, options, policy_logprobs) sets `advantages` and `weights` of all samples of a step,
            over all ranks. policy_logprobs are the trainer's log π_θ of each sample's tokens at the sample's
            temperature, aligned with token_ids; entries outside the loss mask are not read, and only algorithms with a
            teacher read any. Samples that ended in "error", or have no policy-written token, get zeros and are left out
            of all means. Raises ValueError for missing rewards or teacher scores, and for arrays of the wrong length.
        token_losses: token_losses(batch, options) computes the loss of each token, [N], times its correction. The
            trainer multiplies it by the sample's weights and sums, without a further mean.
        uses_teacher: Whether `annotate` needs `teacher_logprobs` and `policy_logprobs`.
    """

    describe: str
    options: type
    annotate: Annotate
    token_losses: Callable[[TokenBatch, Any], torch.Tensor]
    uses_teacher: bool = False


ALGORITHMS: Registry[Algorithm] = Registry("openmimo.rl.algorithms", Algorithm)


def open_algorithm(name: str, options: Mapping[str, Any]) -> tuple[Algorithm, Any]:
    """The algorithm of that name, and its checked options. Raises ConfigError for an unknown name or option."""
    algorithm = ALGORITHMS.get(name)
    return algorithm, from_dict(algorithm.options, dict(options), where=f"options of algorithm {name!r}")


def algorithm_of(config: RlConfig) -> tuple[Algorithm, Any]:
    """The algorithm of a run and its options.

    With unfinished "partial", tokens have different ages: the default correction is then `staleness_tis` and not `tis`.

    Raises:
        ConfigError: The algorithm does not fit the run, or an option has no effect.
    """
    algorithm, options = open_algorithm(config.algorithm, config.algorithm_options)
    if isinstance(config, MopdConfig):
        _check_distillation(config, algorithm, options)
    elif algorithm.uses_teacher:
        raise ConfigError(
            f"algorithm {config.algorithm!r} learns from teachers, and `openmimo rl` has none. Run `openmimo mopd`, "
            "or use another algorithm, such as grpo."
        )
    is_chosen = "correction" in config.algorithm_options
    if config.unfinished == "partial" and not is_chosen and options.correction == Correction("tis"):
        correction = Correction("staleness_tis", max_staleness=config.max_staleness)
        options = replace(options, correction=correction)
    return algorithm, options


def _check_distillation(config: MopdConfig, algorithm: Algorithm, options: Any) -> None:
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    if not algorithm.uses_teacher:
        raise ConfigError(
            f"algorithm {config.algorithm!r} learns from rewards and would ignore the teachers. Take algorithm 'mopd', "
            "or run `openmimo rl` without teachers."
        )
    if config.signal != "sampled":
        if "balance_domains" not in values:
            raise ConfigError(f"signal {config.signal!r} does not use algorithm {config.algorithm!r}; take 'mopd'.")
        defaults = vars(type(options)())
        changed = [name for name, value in values.items() if name != "balance_domains" and value != defaults[name]]
        if changed:
            raise ConfigError(
                f"algorithm_options.{changed[0]} is {values[changed[0]]!r}, which has no effect with signal "
                f"{config.signal!r}: its loss is a divergence, without advantages. Leave it out, or take signal "
                "'sampled'."
            )
    if values.get("scale_domains") and len(config.sources) == 1:
        raise ConfigError("algorithm_options.scale_domains has no effect with one source; leave it out.")
    if values.get("alpha"):
        _check_alpha(config, values["alpha"])


def _check_alpha(config: MopdConfig, alpha: float) -> None:
    """Outcome advantages compare the responses to one prompt. With one response, or only good ones, they are 0."""
    if all(source.samples_per_prompt == 1 for source in config.sources):
        raise ConfigError(
            f"algorithm_options.alpha is {alpha}, which has no effect with samples_per_prompt 1: it compares the "
            "responses to one prompt. Set samples_per_prompt to at least 2 in a source, or leave alpha out."
        )
    if config.min_reward is not None:
        raise ConfigError(
            f"algorithm_options.alpha is {alpha}, and min_reward leaves only responses of at least "
            f"{config.min_reward} to compare. Set one of the two."
        )
