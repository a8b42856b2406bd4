"""The interface between the training loop and the rollouts."""

from typing import Protocol

from openmimo.core.samples import Sample
from openmimo.rl.scheduling.groups import GroupRequest, LateReward


class Rollouts(Protocol):
    """Rolls samples out: with the engine of this process, with other processes, or with workers on other machines."""

    @property
    def num_running(self) -> int:
        """Samples that were submitted and have not been returned."""
        ...

    @property
    def num_unscored(self) -> int:
        """Samples that were returned without their reward."""
        ...

    @property
    def repeats_exactly(self) -> bool:
        """Whether the same requests give the same samples in the same order."""
        ...

    @property
    def runs_while_learning(self) -> bool:
        """Whether samples continue while the trainer updates the policy."""
        ...

    def submit(self, request: GroupRequest) -> None:
        """Start the samples of a request."""
        ...

    def poll(self) -> list[Sample | LateReward]:
        """Run or wait for a moment.

        Returns:
            Samples that ended, and rewards of samples that were returned before. A sample without an error whose reward
            is NaN gets its reward later.
        """
        ...

    def interrupt(self) -> list[Sample]:
        """Stop running samples that a later request can continue, and return what the policy has written.

        Samples that no request can continue keep running, as do all samples of workers.
        """
        ...

    def cancel(self, sample_ids: list[str]) -> None:
        """Stop samples whose group has ended. They are not returned."""
        ...

    def update_weights(self, version: int) -> None:
        """Use the new weights from now on. Running samples continue with them and keep their KV cache."""
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of the rollouts since the last call, by name."""
        ...

    def close(self) -> None:
        """Stop all samples and release engines and workers."""
        ...
