"""What an RL algorithm is: one file in `openmimo/rl/algorithms` that exports `PLUGIN`, an Algorithm.

An algorithm writes into samples how good each token was and how much it counts, and says what the loss of a token is.
The trainer knows nothing else of it. Settings are frozen dataclasses of plain values; this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from openmimo.core.config import from_dict
from openmimo.core.errors import ConfigError
from openmimo.core.fields import NonNegativeFloat, NonNegativeInt, PositiveInt, check_fields
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
    """What to do about the gap between the trained policy and the engine that sampled (`losses/corrections.py`).

    Attributes:
        kind: none; tis: min(ratio, high); icepop: the ratio if within [low, high], else 0; clip: the ratio clipped to
            [low, high]; sequence_mask: drop sequences with a geometric mean ratio outside [low, high]; sequence_tis:
            min(ratio of the sequence, high); staleness_tis: like tis, with a limit that falls with the token's age.
        low: Lower limit (None: the kind's usual one, as for all below; one that the kind does not use is an error).
        high: Upper limit.
        decay: What a version of age leaves of high - 1.
        max_staleness: Tokens older than that many versions are dropped.
        veto_below: Besides, drop sequences in which any token's ratio is below this, such as 1e-4 (0: none).
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
        usual = CORRECTION_LIMITS[self.kind]
        return {name: usual[name] if vars(self)[name] is None else vars(self)[name] for name in usual}

    @property
    def is_gate(self) -> bool:
        """Whether it only drops tokens, and never multiplies by the ratio."""
        return self.kind in ("none", "sequence_mask")


@dataclass(frozen=True)
class PolicyOptions:
    """Settings of every algorithm that learns from rewards.

    Attributes:
        normalization: What a token counts: token (all tokens of the step the same), sequence (all answers the same), or
            constant (1 / (answers * max_answer_tokens)).
        max_answer_tokens: Only with constant (None: the longest answer of the step; give the limit of the rollouts for
            the same number at every step).
        correction: For the gap between trainer and engine.
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
            and allows no correction but "none" and "sequence_mask", since others would count the gap twice.
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
        describe: One line for people.
        options: The frozen dataclass of its settings; `correction` is one of them.
        annotate: annotate(samples, options, policy_logprobs) fills `advantages` and `weights` of all samples of a step,
            over all ranks. policy_logprobs: log π_θ of each sample's tokens, at the sample's temperature, by the
            trainer, aligned with token_ids (entries outside the loss mask are not read; only algorithms with a teacher
            read any). Samples that ended in "error", or without a policy-written token, get zeros and count nowhere.
            Raises ValueError for missing rewards or teacher scores, and for lists of the wrong length.
        token_losses: token_losses(batch, options) gives the loss of each token, [N], times its correction. The trainer
            multiplies it by the sample's weights, and adds up: no further mean.
        uses_teacher: Whether `annotate` needs `teacher_logprobs` and `policy_logprobs`.
    """

    describe: str
    options: type
    annotate: Annotate
    token_losses: Callable[[TokenBatch, Any], torch.Tensor]
    uses_teacher: bool = False


ALGORITHMS: Registry[Algorithm] = Registry("openmimo.rl.algorithms", Algorithm)


def open_algorithm(name: str, options: Mapping[str, Any]) -> tuple[Algorithm, Any]:
    """The plug-in of that name and its checked options. Raises ConfigError for an unknown name or option."""
    algorithm = ALGORITHMS.get(name)
    return algorithm, from_dict(algorithm.options, dict(options), where=f"options of algorithm {name!r}")


def algorithm_of(config: RlConfig) -> tuple[Algorithm, Any]:
    """The algorithm of a run and its options.

    With unfinished "partial", tokens are of different ages: where no correction was chosen, `staleness_tis` takes the
    place of `tis`. Raises ConfigError for an algorithm that does not fit the run, and for options without effect.
    """
    algorithm, options = open_algorithm(config.algorithm, config.algorithm_options)
    if isinstance(config, MopdConfig):
        _check_distillation(config, algorithm, options)
    elif algorithm.uses_teacher:
        raise ConfigError(
            f"algorithm {config.algorithm!r} learns from teachers, which `openmimo rl` has none of. Run `openmimo "
            "mopd`, or take another algorithm, such as grpo."
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
        usual = vars(type(options)())
        changed = [name for name, value in values.items() if name != "balance_domains" and value != usual[name]]
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
    """Outcome advantages compare the answers to one prompt; with one answer, or only the good ones, they are 0."""
    if all(source.samples_per_prompt == 1 for source in config.sources):
        raise ConfigError(
            f"algorithm_options.alpha is {alpha}, which has no effect with samples_per_prompt 1: an only answer has "
            "nothing to be compared with. Ask for at least 2 in a source, or leave alpha out."
        )
    if config.min_reward is not None:
        raise ConfigError(
            f"algorithm_options.alpha is {alpha}, and min_reward leaves only answers of at least {config.min_reward} "
            "to compare. Set one of the two."
        )
