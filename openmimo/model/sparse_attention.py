"""The sparse layer of HySparse (arXiv 2602.03560): two branches with common queries, mixed by sigmoid gates.

    chosen blocks   softmax over the keys of the chosen blocks of layer `kv_from`, applied to its values
    window          softmax over the layer's own last `window_keys` keys, applied to its own values
    output          sigmoid(sparse gate) * chosen blocks + sigmoid(window gate) * window

The full layer scores its blocks by the largest probability of a key (equation 3). All query heads of a key/value head
read the blocks that score highest for any of them. The choice has no gradient.

T packed tokens, N query heads, G key/value heads, K key dim, V value dim, C blocks, J chosen blocks, D model dim.
"""

import torch
from torch import nn

from openmimo.kernels.attention import ChosenBlocks
from openmimo.kernels.operations import apply_rotary
from openmimo.model.attention import AttentionPlace
from openmimo.model.context import AttentionCall, AttentionContext
from openmimo.model.layers import Attention, Linear, project


def choose_blocks(scores_TGC: torch.Tensor, positions_T: torch.Tensor, *, size: int, count: int) -> ChosenBlocks:
    """Choose the `count` blocks with the highest scores of each query and key/value head, or all if there are fewer.

    Of equal scores, the earlier block is chosen, so that the choice does not depend on the number of later blocks.

    Args:
        scores_TGC: Block scores, at least 0.
        positions_T: Position of each query in its sequence.
        size: Keys of a block.
        count: J.
    """
    num_blocks = scores_TGC.shape[2]
    block_C = torch.arange(num_blocks, device=scores_TGC.device)
    is_later_TC = block_C * size > positions_T[:, None]
    ranked = scores_TGC.masked_fill(is_later_TC[:, None], -1.0).sort(dim=2, descending=True, stable=True)
    ids_TGJ = ranked.indices[..., :count].masked_fill(ranked.values[..., :count] < 0, num_blocks).sort(dim=2).values
    return ChosenBlocks(ids_TGJ.masked_fill(ids_TGJ == num_blocks, -1), size)


class SparseAttention(Attention):
    """Chosen blocks of an earlier layer's keys, and a window of its own keys.

    `attention_sink_bias` is the sink of the window; the two sinks are separate parameters.
    """

    def __init__(self, place: AttentionPlace):
        super().__init__(place)
        spec = place.spec
        gates = spec.num_heads * (spec.value_dim if spec.gate == "channel" else 1)
        self.sparse_gate_proj = Linear(place.hidden_size, gates, bias=False)
        self.window_gate_proj = Linear(place.hidden_size, gates, bias=False)
        self.sparse_sink_bias = nn.Parameter(torch.zeros(spec.num_heads)) if spec.sink else None

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map [T, D] to [T, D]."""
        spec, T = self.spec, x_TD.shape[0]
        N, G, K, V = spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim
        joined = project(x_TD, (self.q_proj, self.k_proj, self.v_proj, self.sparse_gate_proj, self.window_gate_proj))
        queries_and_keys, values, gates = joined.tensor_split([(N + G) * K, (N + G) * K + G * V], dim=1)
        rotated = apply_rotary(queries_and_keys.view(T, N + G, K), *context.rotary(spec, x_TD.dtype))
        q_TNK, k_TGK = rotated.split_with_sizes([N, G], dim=1)
        v_TGV = values.view(T, G, V) * self.value_scale
        window = AttentionCall(self.index, q_TNK, k_TGK, v_TGV, self.attention_sink_bias, spec.window_keys)
        sparse = AttentionCall(
            self.index,
            q_TNK,
            None,
            None,
            self.sparse_sink_bias,
            None,
            source_layer=spec.kv_from,
            blocks=self._blocks(context),
        )
        sparse_gate, window_gate = gates.sigmoid().view(T, 2, N, -1).unbind(1)
        out_TNV = sparse_gate * context.attend(sparse).out_TNV + window_gate * context.attend(window).out_TNV
        return self.o_proj(out_TNV.reshape(T, N * V))

    def _blocks(self, context: AttentionContext) -> ChosenBlocks:
        """Return the blocks that this layer reads. The first layer that reads a source's scores chooses for all."""
        spec = self.spec
        assert spec.kv_from is not None and spec.selected_keys is not None and spec.score_block is not None
        key = (spec.kv_from, spec.selected_keys)
        if key not in context.chosen_blocks:
            context.chosen_blocks[key] = choose_blocks(
                context.block_scores[spec.kv_from],
                context.positions_T,
                size=spec.score_block,
                count=spec.selected_keys // spec.score_block,
            )
        return context.chosen_blocks[key]
