"""Normalization of the loss of a step: weights [N] of tokens in sequence order.

`lengths_B` (int64) is the number of policy-written tokens of each sequence of the whole step, over all micro-batches
and ranks. The weights of "token" and "sequence" add up to 1.

N policy-written tokens of a step, B sequences.
"""

import torch

LOWEST_DOMAIN_SCALE, HIGHEST_DOMAIN_SCALE = 0.25, 4.0


def token_weights(lengths_B: torch.Tensor) -> torch.Tensor:
    """1 / number of tokens, [N] float64: equal weights of tokens, so long responses dominate the gradient (MiMo-7B)."""
    num_tokens = int(lengths_B.sum())
    return torch.full((num_tokens,), 1.0 / max(1, num_tokens), dtype=torch.float64)


def sequence_weights(lengths_B: torch.Tensor) -> torch.Tensor:
    """1 / (B * |y|), [N] float64: all responses have equal weight (MOPD, 2601.02780, equation 7)."""
    return (1.0 / (len(lengths_B) * lengths_B.double())).repeat_interleave(lengths_B)


def constant_weights(lengths_B: torch.Tensor, *, max_length: int) -> torch.Tensor:
    """1 / (B * max_length), [N] float64: token weights do not depend on the response length (Dr. GRPO, 2503.20783)."""
    num_tokens = int(lengths_B.sum())
    return torch.full((num_tokens,), 1.0 / (max(1, len(lengths_B)) * max_length), dtype=torch.float64)


def balance_domains(weights_N: torch.Tensor, lengths_B: torch.Tensor, domains_B: torch.Tensor) -> torch.Tensor:
    """Scales the weights so that every domain has the same total and the overall total is unchanged, [N].

    Otherwise the domain with the longest or most responses dominates the gradient (Open-MOPD, 2608.19098). `domains_B`
    is int64, 0 to the number of domains - 1.
    """
    domains_N = domains_B.repeat_interleave(lengths_B)
    present = torch.unique(domains_N)
    totals = weights_N.new_zeros(len(torch.bincount(domains_B))).index_add(0, domains_N, weights_N)
    return weights_N * (weights_N.sum() / (len(present) * totals))[domains_N]


def domain_scales(gaps_N: torch.Tensor, domains_N: torch.Tensor) -> torch.Tensor:
    """clip(σ of all / σ of the token's domain, 0.25, 4), [N]: factors for advantages (DN-MOPD, 2609.35347).

    `gaps_N` is log π_teacher - log π_θ; entries that are not finite are ignored. σ is the standard deviation over
    tokens. Signs and means are kept (no whitening). A domain without spread has the factor 1.
    """
    finite_N = gaps_N.isfinite()
    overall = _spread(gaps_N[finite_N])
    scales_N = torch.ones_like(gaps_N)
    for domain in torch.unique(domains_N):
        spread = _spread(gaps_N[finite_N & (domains_N == domain)])
        if spread > 0:
            scales_N[domains_N == domain] = (overall / spread).clamp(LOWEST_DOMAIN_SCALE, HIGHEST_DOMAIN_SCALE)
    return scales_N


def _spread(values: torch.Tensor) -> torch.Tensor:
    return values.std(correction=0) if len(values) else values.new_zeros(())
