"""The mapping between checkpoint tensors and model parameters.

Attribute names of the model are those of the checkpoint, so most tensors map to the parameter of the same name. There
are two exceptions. Experts are stored one by one, and the model stacks them. The MiMo-7B family has other names for the
parts of its MTP layer, and concatenates the hidden state before the embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from openmimo.kernels.weights import Weight, copy_weight, dequantized, rows_of, unbind
from openmimo.model.config import ModelConfig
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import entry_weight

_MIMO_7B_MTP_NAMES = {
    "enorm": "token_layernorm",
    "hnorm": "hidden_layernorm",
    "eh_proj": "input_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Slot:
    """The part of the model that corresponds to one checkpoint tensor.

    Attributes:
        name: The name of the tensor in the checkpoint.
        target: The view of the parameter or buffer that it fills (a meta tensor on a meta model).
        swaps_halves: Whether the checkpoint stores the two column halves in the opposite order.
        is_router: Whether the tensor is float32 independent of the model's dtype.
    """

    name: str
    target: Weight
    swaps_halves: bool = False
    is_router: bool = False

    def from_checkpoint(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert a checkpoint tensor to the layout of the model; the conversion is its own inverse."""
        return torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1) if self.swaps_halves else tensor

    def fill(self, weight: Weight) -> None:
        """Copy a weight of the checkpoint to the target, in the format of the target."""
        copy_weight(
            self.target, self.from_checkpoint(dequantized(weight, torch.float32)) if self.swaps_halves else weight
        )

    def to_checkpoint(self) -> torch.Tensor:
        """The tensor to store in the checkpoint. The target must be plain."""
        return self.from_checkpoint(self.plain_target)

    @property
    def plain_target(self) -> torch.Tensor:
        """The target of a model that is not quantized."""
        assert isinstance(self.target, torch.Tensor)
        return self.target


def slots(model: MiMo) -> Iterator[Slot]:
    """Every checkpoint tensor of the model, in checkpoint order by module. Works on a meta-device model."""
    tied = model.config.tie_embeddings
    for name, tensor in model.state_dict(keep_vars=False).items():
        weight = entry_weight(model, name, tensor)
        if weight is None or (tied and name == "lm_head.weight"):
            continue
        if name.endswith(".experts.gate_up_proj"):
            yield from _gate_up_slots(name, weight)
        elif name.endswith(".experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down_DF in enumerate(unbind(weight)):
                yield Slot(f"{prefix}{expert}.down_proj.weight", down_DF)
        elif model.config.family == "mimo" and name.startswith("model.mtp."):
            yield _mimo_7b_mtp_slot(name, weight)
        else:
            yield Slot(name, weight, is_router=".mlp.gate." in name)


def _gate_up_slots(name: str, weight_EHD: Weight) -> Iterator[Slot]:
    prefix, half = name.removesuffix("gate_up_proj"), weight_EHD.shape[1] // 2
    for expert, gate_up_HD in enumerate(unbind(weight_EHD)):
        yield Slot(f"{prefix}{expert}.gate_proj.weight", rows_of(gate_up_HD, 0, half))
        yield Slot(f"{prefix}{expert}.up_proj.weight", rows_of(gate_up_HD, half, 2 * half))


def _mimo_7b_mtp_slot(name: str, tensor: Weight) -> Slot:
    head, part, *rest = name.removeprefix("model.mtp.layers.").split(".")
    hub_name = ".".join(["model.mtp_layers", head, _MIMO_7B_MTP_NAMES.get(part, part), *rest])
    return Slot(hub_name, tensor, swaps_halves=part == "eh_proj")


def count_mtp_heads(names: set[str], config: ModelConfig) -> int:
    """Number of MTP heads whose tensors a checkpoint has; the hub's config of V2-Flash does not state it."""
    prefix = "model.mtp_layers." if config.family == "mimo" else "model.mtp.layers."
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
