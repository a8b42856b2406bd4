"""Expert load from recorded routes.

E experts.
"""

import torch

from openmimo.kernels.experts import count_experts
from openmimo.model.context import RoutingTape
from openmimo.model.mimo import MiMo


def add_expert_load(load: dict[int, torch.Tensor], routing: RoutingTape, model: MiMo) -> None:
    """Adds the number of tokens that visited each expert, int64 [E], to the counts in `load` by layer."""
    for layer, ids_TA in routing.recorded.items():
        assert model.config.moe is not None, "only sparse layers record routes"
        counts_E = count_experts(ids_TA, model.config.moe.num_experts)
        load[layer] = load[layer] + counts_E if layer in load else counts_E
