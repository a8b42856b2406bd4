"""Expert-load traces drawn from known shares, as ground truth for detectors and predictors."""

import numpy as np

from openmimo.core.load_trace import LoadTrace, TraceHeader


def drawn_trace(shares_SLE: np.ndarray, *, tokens: int | np.ndarray, seed: int) -> LoadTrace:
    """Return a trace in which each token of a step chooses one expert with the shares of the step.

    Args:
        shares_SLE: Shares by step, layer and expert.
        tokens: Tokens of every step, or of each one.
        seed: Seed of the draws.
    """
    num_steps, num_layers, num_experts = shares_SLE.shape
    tokens_SL = np.broadcast_to(np.asarray(tokens).reshape(-1, 1), (num_steps, num_layers))
    counts = np.random.default_rng(seed).multinomial(tokens_SL, shares_SLE)
    header = TraceHeader(tuple(range(1, num_layers + 1)), num_experts, 1, "uint32")
    return LoadTrace(header, np.arange(1, num_steps + 1), counts)


def random_shares(num_experts: int, *, spread: float, seed: int) -> np.ndarray:
    """Return shares of one layer, [1, experts]: a softmax of normal numbers with standard deviation `spread`."""
    weights = np.exp(spread * np.random.default_rng(seed).standard_normal((1, num_experts)))
    return weights / weights.sum()


def drift(first_LE: np.ndarray, last_LE: np.ndarray, *, before: int, during: int, after: int) -> np.ndarray:
    """Return shares that stay, move in a line from the first to the last ones, and stay, [steps, layers, experts]."""
    moved_S = np.concatenate([np.zeros(before), np.linspace(0.0, 1.0, during + 2)[1:-1], np.ones(after)])[:, None, None]
    return (1.0 - moved_S) * first_LE + moved_S * last_LE
