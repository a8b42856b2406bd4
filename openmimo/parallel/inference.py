"""A model divided among the ranks of an engine, and its weights from a checkpoint folder.

Every rank has the same tokens and the same states. It holds a part of the weights:

    attention     some query heads, and their key/value heads; the ranks' outputs are added
    dense FFN     some hidden dims; outputs are added
    experts       some hidden dims of every expert, or all of some experts; outputs are added
    embedding     the rows of some tokens; a rank gives zeros for the others, and the results are added
    output head   the rows of the same tokens; logits are gathered, log-probabilities are joined without logits

Norms, routers and the projections of the MTP heads are whole on every rank. All ranks compute the same routes and the
same logits, so that they may decide tokens without a further message.

The parts are plain tensors, unlike those of training (`parallel.tensor`): kernels read them by address, and they may be
int8. T packed tokens, D model dim, V vocabulary, W tokens of a rank, E experts, A active experts, M ranks.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F

from openmimo.core.errors import ConfigError
from openmimo.kernels.operations import apply_experts
from openmimo.kernels.weights import INT8, PLAIN, BlockScaled, Weight, copy_weight, dequantized, quantize
from openmimo.model.backbone import DecoderLayer
from openmimo.model.config import ModelConfig, MoEConfig
from openmimo.model.context import AttentionContext, PackedContext
from openmimo.model.heads import Head, Reader
from openmimo.model.hf import check_fit, open_checkpoint, slots
from openmimo.model.layers import Attention, DenseFFN, Embedding, as_dtype
from openmimo.model.mimo import MiMo
from openmimo.model.moe import Experts, MoE
from openmimo.model.weight_formats import allocate_quantized, entry_weight
from openmimo.runtime.device import DTYPES

_FORMATS = (PLAIN, INT8)
_KINDS = ("full", "sliding")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_SCORED_ROWS = 1024  # rows whose logits are held at once
_Part = tuple[slice, ...]


class RankGroup:
    """The collectives of the ranks of one engine. All ranks call them in the same order.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int):
        self.size = size
        self._group: Any = None  # torch has no public name for the class of gloo and NCCL

    def use(self, group: Any) -> None:
        """Connect the ranks. Models may be built before."""
        self._group = group

    def abort(self) -> None:
        """End collectives that wait for a rank that has ended, from another thread. Gloo ends them by itself."""
        if self._group is not None and self._group.name() == "nccl":
            self._group.abort()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of the ranks' tensors, which may overwrite x. All ranks get the same bits."""
        assert self._group is not None, "the ranks are connected"
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return the ranks' tensors x [n, ...] of equal shapes as one [ranks x n, ...]."""
        assert self._group is not None, "the ranks are connected"
        gathered = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._group._allgather_base(gathered, x.contiguous()).wait()
        return gathered


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error of a collective says that another rank has ended; gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@dataclass(frozen=True)
class Division:
    """The part of a model that a rank holds.

    Attributes:
        rank: The rank.
        size: Number of ranks.
        by_expert: Whether a rank holds all of some experts. Otherwise it holds some hidden dims of every expert.
    """

    rank: int
    size: int
    by_expert: bool = False

    def local(self, config: ModelConfig) -> ModelConfig:
        """Return the geometry of a rank, in which vocabulary and number of experts are those of the whole model.

        Raises:
            ConfigError: The model cannot be divided; the message says by what.
        """
        local, moe = config.local(tp=self.size), config.moe
        kinds = sorted({spec.kind for spec in config.attention_layers()} - set(_KINDS))
        if kinds:
            raise ConfigError(f"tp divides layers of kinds {' and '.join(_KINDS)}; the model has {', '.join(kinds)}.")
        if self.by_expert and moe is None:
            raise ConfigError("ep divides experts among the ranks, but the model has none; leave ep out.")
        if moe is not None:
            count, what = (moe.num_experts, "experts") if self.by_expert else (moe.expert_dim, "hidden dims an expert")
            if count % self.size:
                raise ConfigError(
                    f"the model has {count} {what}, which {self.size} ranks cannot divide; give a tp that divides it."
                )
            if not self.by_expert:
                local = replace(local, moe=replace(moe, expert_dim=moe.expert_dim // self.size))
        if self._share_of_tokens(config) * (self.size - 1) >= config.vocab_size:
            raise ConfigError(f"the model has {config.vocab_size} tokens, too few for {self.size} ranks.")
        return local

    def held_experts(self, moe: MoEConfig) -> range:
        """The experts of which the rank holds weights."""
        if not self.by_expert:
            return range(moe.num_experts)
        share = moe.num_experts // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def tokens(self, config: ModelConfig) -> range:
        """The tokens whose embeddings and logits the rank has."""
        share = self._share_of_tokens(config)
        return range(self.rank * share, min((self.rank + 1) * share, config.vocab_size))

    def part(self, name: str, whole: tuple[int, ...], local: tuple[int, ...]) -> _Part:
        """Return the entries of a tensor of the whole model that a rank holds.

        Args:
            name: Name of the tensor. The vocabulary is divided by `tokens`; the last rank may have fewer.
            whole: Shape of the tensor.
            local: Shape of the part. A part of fewer key/value heads than ranks is that of one head.
        """
        parts = []
        for count, held in zip(whole, local, strict=True):
            if name in _VOCABULARY and count != held:
                first = self.rank * -(-count // self.size)
            else:
                first = self.rank * count // self.size // held * held if count != held else 0
            parts.append(slice(first, first + held))
        return tuple(parts)

    def _share_of_tokens(self, config: ModelConfig) -> int:
        return -(-config.vocab_size // self.size)


class SummedAttention(Attention):
    """The heads of one rank."""

    group: RankGroup

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """As `Attention.forward`."""
        return self.group.sum(super().forward(x_TD, context))


class SummedFFN(DenseFFN):
    """The hidden dims of one rank."""

    group: RankGroup

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """As `DenseFFN.forward`."""
        return self.group.sum(super().forward(x_TD))


class SummedExperts(Experts):
    """Some hidden dims of every expert."""

    group: RankGroup

    def forward(self, x_TD: torch.Tensor, ids_TA: torch.Tensor, weights_TA: torch.Tensor) -> torch.Tensor:
        """As `Experts.forward`."""
        return self.group.sum(super().forward(x_TD, ids_TA, weights_TA))


class HeldExperts(Experts):
    """All of some experts. Every rank has all tokens, so no token travels: a rank applies the experts that it holds.

    Attributes:
        held: Their ids.
    """

    group: RankGroup
    held: range

    def forward(self, x_TD: torch.Tensor, ids_TA: torch.Tensor, weights_TA: torch.Tensor) -> torch.Tensor:
        """As `Experts.forward`. On an accelerator the host waits for the number of choices that a rank holds."""
        gate_up_EHD, down_EDF = self.weight_as("gate_up_proj", x_TD.dtype), self.weight_as("down_proj", x_TD.dtype)
        is_held_TA = (ids_TA >= self.held.start) & (ids_TA < self.held.stop)
        token_S, choice_S = is_held_TA.nonzero(as_tuple=True)
        out_TD = torch.zeros_like(x_TD)
        if len(token_S):
            ids_S1 = (ids_TA[token_S, choice_S] - self.held.start)[:, None]
            weights_S1 = weights_TA[token_S, choice_S][:, None]
            chosen_SD = apply_experts(x_TD[token_S], ids_S1, weights_S1, gate_up_EHD, down_EDF)
            out_TD.index_add_(0, token_S, chosen_SD)
        return self.group.sum(out_TD)


class DividedEmbedding(Embedding):
    """The embeddings of some tokens.

    Attributes:
        first: The first token.
    """

    group: RankGroup
    first: int

    def forward(self, tokens_T: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `Embedding.forward`."""
        local_T = tokens_T - self.first
        is_other_T = (local_T < 0) | (local_T >= self.num_embeddings)
        x_TD = F.embedding(local_T.masked_fill(is_other_T, 0), self.weight).masked_fill(is_other_T[:, None], 0.0)
        return self.group.sum(x_TD if dtype is None else as_dtype(x_TD, dtype))


class DividedHead(Head):
    """The logits of some tokens.

    Attributes:
        first: The first token.
        vocab_size: Tokens of all ranks.
    """

    group: RankGroup
    first: int
    vocab_size: int

    def forward(self, states_TD: torch.Tensor, reader: Reader | None = None, *, as_held: bool = False) -> Any:
        """Return logits [T, V] as `Head.forward`; no rank has the weight that a reader reads."""
        assert reader is None, "no rank has the whole weight"
        local_TW = super().forward(states_TD)
        width = -(-self.vocab_size // self.group.size)
        if local_TW.shape[1] < width:
            local_TW = F.pad(local_TW, (0, width - local_TW.shape[1]))
        gathered_MTW = self.group.gather(local_TW[None])
        return gathered_MTW.transpose(0, 1).reshape(len(states_TD), -1)[:, : self.vocab_size]

    def logprobs(
        self, states_TD: torch.Tensor, labels_T: torch.Tensor, temperature: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        """As `Head.logprobs`. Two numbers a row travel: the label's logit, and the log of the sum over the tokens."""
        temperature_T = torch.as_tensor(temperature, device=states_TD.device).expand(len(labels_T))
        pieces = zip(*(tensor.split(_SCORED_ROWS) for tensor in (states_TD, labels_T, temperature_T)), strict=True)
        return torch.cat([states_TD.new_empty(0, dtype=torch.float32), *(self._joined(*piece) for piece in pieces)])

    def _joined(self, states_RD: torch.Tensor, labels_R: torch.Tensor, temperature_R: torch.Tensor) -> torch.Tensor:
        logits_RW = super().forward(states_RD)
        logits_RW = logits_RW / temperature_R[:, None].to(logits_RW.dtype)
        local_R = labels_R - self.first
        is_other_R = (local_R < 0) | (local_R >= logits_RW.shape[1])
        chosen_R = logits_RW.gather(1, local_R.masked_fill(is_other_R, 0)[:, None])[:, 0].masked_fill(is_other_R, 0.0)
        chosen_MR, sums_MR = self.group.gather(torch.stack([chosen_R, logits_RW.logsumexp(dim=1)])[None]).unbind(1)
        return chosen_MR.sum(dim=0) - sums_MR.logsumexp(dim=0)

    def argmax(self, states_TD: torch.Tensor) -> torch.Tensor:
        """As `Head.argmax`."""
        return self(states_TD).argmax(dim=-1)


class DividedModel:
    """The part of a model that one rank holds.

    Args:
        path: A checkpoint folder; see `load_model`.
        division: The part.
        group: The ranks.
        dtype: Of weights and activations, a key of `DTYPES`.
        device: Of the part.
        weights: plain or int8.

    Attributes:
        model: The part, of which every method computes what the whole model does if all ranks call it.

    Raises:
        CheckpointError: The folder cannot be read.
        ConfigError: The model or the format of its weights cannot be divided.
    """

    def __init__(
        self, path: str | Path, division: Division, group: RankGroup, *, dtype: str, device: torch.device, weights: str
    ):
        config, reader = open_checkpoint(Path(path), None)
        local = check_division(config, division, weights)
        self._config, self._division = config, division
        with torch.device("meta"):
            whole, self.model = MiMo(config), MiMo(local)
            _replace_modules(self.model, config, division, group)
        check_fit(whole, reader)
        self._whole_shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
        model = self.model = self.model.to(DTYPES[dtype])
        for router in model.routers().values():
            router.to(torch.promote_types(DTYPES[dtype], torch.float32))
        if weights == INT8:
            allocate_quantized(model, "int8")
        model = model.to_empty(device=device)
        model.tie_weights()
        shapes = {slot.name: tuple(slot.target.shape) for slot in slots(whole)}
        by_name = {self._stored_name(slot.name): slot for slot in slots(model)}
        with torch.no_grad():
            for name in reader.names_by_file(set(by_name)):
                slot = by_name[name]
                if slot.target.shape == shapes[name]:
                    slot.fill(reader.read_weight(name, config))
                else:
                    part = division.part(name, shapes[name], tuple(slot.target.shape))
                    if isinstance(slot.target, torch.Tensor):
                        copy_weight(slot.target, reader.read_part(name, config, part))
                    else:
                        _copy_part(slot.target, reader.read_weight(name, config), part)
        model.eval()

    @property
    def num_bytes(self) -> int:
        """Memory of the weights of this rank."""
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in self.model.state_dict().values()}
        return sum(tensors.values())

    def whole_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter or buffer of the whole model; None if there is none of that name."""
        return self._whole_shapes.get(name)

    @torch.no_grad()
    def set_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Copy this rank's part of new values of the whole tensor `name`, quantized if it is held so."""
        target = entry_weight(self.model, name, self.model.state_dict()[name])
        assert target is not None, "only weights have new values"
        if tuple(target.shape) == self._whole_shapes[name]:
            part = tuple(slice(0, count) for count in target.shape)
        elif name.endswith(".experts.gate_up_proj") and not self._division.by_expert:
            self._set_gate_up(target, tensor)
            return
        else:
            part = self._division.part(name, tuple(tensor.shape), tuple(target.shape))
        _copy_part(target, tensor, part)

    def _set_gate_up(self, target: Weight, tensor_EHD: torch.Tensor) -> None:
        """Set the gate rows and then the up rows of some hidden dims of every expert."""
        held, whole = target.shape[1] // 2, tensor_EHD.shape[1] // 2
        first = self._division.rank * held
        everything = slice(None)
        for half in range(2):
            rows = slice(half * whole + first, half * whole + first + held)
            local = slice(half * held, (half + 1) * held)
            if isinstance(target, torch.Tensor):
                target[:, local].copy_(tensor_EHD[:, rows])
            else:
                assert isinstance(target, BlockScaled)
                _copy_part(
                    BlockScaled(target.codes[:, local], target.scales[:, local], target.block),
                    tensor_EHD,
                    (everything, rows, everything),
                )

    def _stored_name(self, name: str) -> str:
        """Return the name in the checkpoint of a tensor of this rank: experts are numbered over all ranks."""
        moe = self._config.moe
        if moe is None:
            return name
        first = self._division.held_experts(moe).start
        return re.sub(r"(?<=\.experts\.)\d+(?=\.)", lambda match: str(int(match[0]) + first), name)


def check_division(config: ModelConfig, division: Division, weights: str) -> ModelConfig:
    """Return the geometry of a rank. Raises ConfigError if the model or the format of its weights cannot be divided."""
    if weights not in _FORMATS:
        raise ConfigError(
            f"weights is {weights!r}, a format whose blocks are not divided among ranks; use plain or int8 with tp."
        )
    return division.local(config)


def text_logprobs(model: MiMo, tokens_T: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token given those before it, [T - 1]. All ranks call it together."""
    states_TD = model(tokens_T, PackedContext((len(tokens_T),), device=model.device)).post_norm_TD
    return model.head.logprobs(states_TD[:-1], tokens_T[1:])


def _replace_modules(model: MiMo, config: ModelConfig, division: Division, group: RankGroup) -> None:
    """Give the modules of a rank's geometry the class that adds the results of the ranks."""
    for layer in (*model.model.layers, *model.model.mtp.layers):
        attention = cast(Attention, layer.self_attn)
        assert type(attention) is Attention, "a kind that divides heads has this class"
        attention.__class__ = SummedAttention
        assert isinstance(attention, SummedAttention)
        attention.group = group
        if isinstance(layer, DecoderLayer) and layer.is_sparse:
            _divide_experts(cast(MoE, layer.mlp), config, division, group)
        else:
            layer.mlp.__class__ = SummedFFN
            assert isinstance(layer.mlp, SummedFFN)
            layer.mlp.group = group
    held = division.tokens(config)
    embedding, head = Embedding(len(held), config.hidden_size), Head(config.hidden_size, len(held))
    embedding.__class__, head.__class__ = DividedEmbedding, DividedHead
    assert isinstance(embedding, DividedEmbedding) and isinstance(head, DividedHead)
    embedding.group = head.group = group
    embedding.first = head.first = held.start
    head.vocab_size = config.vocab_size
    model.model.embed_tokens, model.lm_head = embedding, head
    model.tie_weights()


def _divide_experts(layer: MoE, config: ModelConfig, division: Division, group: RankGroup) -> None:
    assert config.moe is not None
    if division.by_expert:
        held = division.held_experts(config.moe)
        sizes = replace(config.moe, num_experts=len(held), experts_per_token=1, num_groups=1, groups_per_token=1)
        layer.experts = Experts(config.hidden_size, sizes)
        layer.experts.__class__ = HeldExperts
        assert isinstance(layer.experts, HeldExperts)
        layer.experts.held = held
    else:
        layer.experts.__class__ = SummedExperts
    assert isinstance(layer.experts, (SummedExperts, HeldExperts))
    layer.experts.group = group


def _copy_part(target: Weight, whole: Weight, part: _Part) -> None:
    """Copy a part of a weight. Quantized values are those of the whole weight, quantized: scales are those of rows."""
    if isinstance(target, torch.Tensor):
        target.copy_(dequantized(whole, torch.float32)[part] if not isinstance(whole, torch.Tensor) else whole[part])
        return
    assert isinstance(target, BlockScaled) and target.format == INT8, "the formats of `_FORMATS`"
    quantized = quantize(dequantized(whole, torch.float32).to(target.codes.device), "int8")
    target.codes.copy_(quantized.codes[part])
    target.scales.copy_(quantized.scales[part[:-1]])
