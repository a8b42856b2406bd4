"""Attention in integers: the definition (INT-FlashAttention, arXiv 2409.16997, with the smoothing of SageAttention).

Queries and keys are int8 with a scale for each row, values int8 with one scale for a sequence and key/value head, and
probabilities are integers from 0 to 127 relative to the largest one. The mean of a sequence's keys is subtracted from
them first. This adds the same number to all logits of a query, so probabilities stay, and a bias of the channels does
not take the range of the codes. A sink and the logarithm of the denominator are corrected by that number.

Products of codes are exact: float32 holds the sums of up to 1,040 dims, and float64 those of any number of keys.

One sequence: T queries, S keys, N query heads, G key/value heads, R = N / G, K key dim, V value dim.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

LARGEST_CODE = 127


class Codes(NamedTuple):
    """Rows [..., X] = codes * scales[..., None]; codes are whole numbers of magnitude up to 127, held in float32."""

    codes: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class IntegerSettings:
    """Parts of the definition that the papers leave open or that tests compare.

    Attributes:
        values: "full" (int8 probabilities and values) or "half" (both in float32).
        smooth_keys: Whether the mean key is subtracted.
        rows: Whether queries and keys have a scale for each row; otherwise one for each head.
        sum_codes: Whether the denominator is the sum of the rounded probabilities, so that the weights of a row sum to
            one (the paper). Otherwise it is that of the exact ones (the public code).
    """

    values: Literal["full", "half"] = "full"
    smooth_keys: bool = True
    rows: bool = True
    sum_codes: bool = True


def quantize(x: torch.Tensor, dims: tuple[int, ...] = (-1,)) -> Codes:
    """Quantize with one scale over `dims`, of which the last axis is one. Zeros have the codes 0."""
    largest = x.abs().amax(dim=dims, keepdim=True)
    scales = torch.where(largest > 0, largest / LARGEST_CODE, 1.0)
    return Codes((x / scales).round(), scales.expand(*x.shape[:-1], 1)[..., 0])


def attend_in_integers(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    scale: float,
    causal: bool,
    settings: IntegerSettings,
    tile_keys: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [T, N, V] and the logarithm of the denominator [T, N] of one sequence, in float32.

    The number of keys of a tile bounds the memory, and changes no bit of a result with int8 values.

    Args:
        q_TNK: Queries, the last positions of the sequence.
        k_SGK: Keys.
        v_SGV: Values.
        sink_N: Sink logits, or None.
        scale: Factor of the logits.
        causal: Whether keys after a query's position are hidden.
        settings: Parts that are open.
        tile_keys: Keys of a tile.
    """
    T, N, _ = q_TNK.shape
    S, G, V = v_SGV.shape
    axes = (-1,) if settings.rows else (0, -1)
    k_SGK = k_SGK.float()
    mean_GK = k_SGK.mean(0) if settings.smooth_keys else torch.zeros_like(k_SGK[0])
    q_TGRK = q_TNK.float().unflatten(1, (G, N // G))
    query, key = quantize(q_TGRK, axes), quantize(k_SGK - mean_GK, axes)
    moved_TGR = torch.einsum("tgrk,gk->tgr", q_TGRK, mean_GK) * scale
    exact = torch.float64 if settings.values == "full" else torch.float32
    value = Codes(v_SGV.float(), torch.ones(1, 1, device=v_SGV.device))
    if settings.values == "full":
        value = quantize(value.codes, (0, -1))

    def logits(tile: slice) -> torch.Tensor:
        products_TGRS = torch.einsum("tgrk,sgk->tgrs", query.codes, key.codes[tile])
        logits_TGRS = products_TGRS * (query.scales * scale)[..., None] * key.scales[tile].T[:, None]
        places_S = torch.arange(S, device=q_TNK.device)[tile]
        hidden_TS = (places_S > torch.arange(S - T, S, device=q_TNK.device)[:, None]) & causal
        return logits_TGRS.masked_fill(hidden_TS[:, None, None], float("-inf"))

    tiles = [slice(start, start + tile_keys) for start in range(0, S, tile_keys)]
    largest_TGR = torch.stack([logits(tile).amax(-1) for tile in tiles]).amax(0)
    sink_TGR = None if sink_N is None else sink_N.float().view(G, -1) - moved_TGR
    if sink_TGR is not None:
        largest_TGR = torch.maximum(largest_TGR, sink_TGR)
    sums_TGR = torch.zeros_like(largest_TGR, dtype=exact)
    weighted_TGRV = torch.zeros(*largest_TGR.shape, V, dtype=exact, device=q_TNK.device)
    for tile in tiles:
        weights_TGRS = (logits(tile) - largest_TGR[..., None]).exp() * LARGEST_CODE
        codes_TGRS = weights_TGRS.round() if settings.values == "full" else weights_TGRS
        sums_TGR += (codes_TGRS if settings.sum_codes else weights_TGRS).to(exact).sum(-1)
        weighted_TGRV += torch.einsum("tgrs,sgv->tgrv", codes_TGRS.to(exact), value.codes[tile].to(exact))
    if sink_TGR is not None:
        sums_TGR = sums_TGR + (sink_TGR - largest_TGR).exp() * LARGEST_CODE
    out_TGRV = weighted_TGRV / sums_TGR[..., None] * value.scales[:1, :, None, None]
    denominator_TGR = largest_TGR + (sums_TGR / LARGEST_CODE).log() + moved_TGR
    return out_TGRV.flatten(1, 2).float(), denominator_TGR.flatten(1).float()
