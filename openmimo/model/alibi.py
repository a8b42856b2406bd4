"""The module of ALiBi layers (`openmimo.model.attention.alibi`). T tokens, N query heads, G key/value heads, K, V."""

import torch

from openmimo.model.attention import AttentionPlace, kv_spec
from openmimo.model.context import AttentionCall, AttentionContext
from openmimo.model.layers import Attention, project

_DIGIT = 256


def slopes(num_heads: int) -> list[float]:
    """The slope of each head. A number that is no power of two takes every second slope of the next power for the rest.

    Source: 2108.12409, section 3 and its published code.
    """
    power = 1 << (num_heads.bit_length() - 1)
    found = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    found += [2.0 ** (-8.0 * (head + 1) / (2 * power)) for head in range(0, 2 * (num_heads - power), 2)]
    return found


class AlibiAttention(Attention):
    """Grouped-query attention whose keys carry their positions."""

    def __init__(self, place: AttentionPlace):
        super().__init__(place)
        dims = kv_spec(place.spec).key_dim  # backends divide all dims of a logit by the root of their number
        self.position_dims = dims - place.spec.key_dim
        self.query_scale = (dims / place.spec.key_dim) ** 0.5
        self.weights_N = [slope * dims**0.5 for slope in slopes(place.spec.num_heads)]

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map [T, D] to [T, D]."""
        spec, T = self.spec, x_TD.shape[0]
        N, G, K, V = spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim
        joined = project(x_TD, (self.q_proj, self.k_proj, self.v_proj))
        queries, keys, values = joined.split_with_sizes([N * K, G * K, G * V], dim=1)
        powers_P = _DIGIT ** torch.arange(self.position_dims - 1, -1, -1, device=x_TD.device)
        digits_TP = (context.positions_T[:, None] // powers_P % _DIGIT).to(x_TD.dtype)
        weights_NP = torch.tensor(self.weights_N, dtype=torch.float64, device=x_TD.device)[:, None] * powers_P
        q_TNP = weights_NP.to(x_TD.dtype).expand(T, N, self.position_dims)
        k_TGP = digits_TP[:, None].expand(T, G, self.position_dims)
        v_TGV = values.reshape(T, G, V)
        call = AttentionCall(
            self.index,
            torch.cat([queries.view(T, N, K) * self.query_scale, q_TNP], dim=2),
            torch.cat([keys.view(T, G, K), k_TGP], dim=2),
            v_TGV * self.value_scale if self.value_scale != 1.0 else v_TGV,
            None,
            None,
            is_source=self.is_source,
        )
        return self.o_proj(context.attend(call).out_TNV.reshape(T, N * V))
