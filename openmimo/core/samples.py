"""What post-training learns from: token sequences with one number per token for everything that is known of them.

Rollouts make samples, algorithms annotate them, the trainer only reads the annotations. Text is never tokenized again.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    """One sequence of the policy. Lists have one entry per token of `token_ids`; entry i belongs to token i.

    Attributes:
        token_ids: The prompt, what the policy wrote, and what tools answered, in order.
        loss_mask: Which tokens the policy wrote. Only these are ever part of a loss or of a mean.
        logprobs: log μ(token | tokens before), by the policy that sampled it, at its temperature; 0.0 outside the mask.
        versions: The policy version that sampled the token; -1 outside the mask.
        domain: The data source, which names the teacher.
        group: The same for all samples of one prompt.
        reward: The verifier's, 0 to 1; NaN where there is none: while the sample is written, and where it failed.
        finish_reason: "stop", "length", "repetition", "context" (it went on in another one), "error" (infrastructure
            failed: never learned from), or "too_long" (its prompt is: nothing was sampled).
        temperature: At which it was sampled; log-probabilities of every model are taken at it.
        routed_experts: NumPy array [len(token_ids) - 1, sparse layers, experts a token] of the pass that sampled (R3);
            -1 where unknown; None if there are no experts or nothing was recorded.
        advantages: Annotation: how much better than expected each token was.
        weights: Annotation: what share of the step's loss each token has; 0 outside the mask.
        teacher_logprobs: Annotation: log of the domain's teacher for the token; NaN where it gave none.
        episode: The same for the samples that one episode made, when its context was replaced; "": it made this alone.
        earlier: The episode's contexts before this one, oldest first. They have its reward.
        info: For people: the problem's id, counters of the environment.
    """

    token_ids: list[int]
    loss_mask: list[bool]
    logprobs: list[float]
    versions: list[int]
    domain: str = ""
    group: str = ""
    reward: float = float("nan")
    finish_reason: str = ""
    temperature: float = 1.0
    routed_experts: Any = None
    advantages: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    teacher_logprobs: list[float] = field(default_factory=list)
    episode: str = ""
    earlier: list["Sample"] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the policy wrote."""
        return sum(self.loss_mask)

    def written_versions(self) -> list[int]:
        """The policy version of each token that the policy wrote, in all contexts."""
        return [
            version
            for context in self.contexts()
            for version, is_written in zip(context.versions, context.loss_mask, strict=True)
            if is_written
        ]

    def contexts(self) -> list["Sample"]:
        """All contexts of the episode, this one the last."""
        return [*self.earlier, self]
