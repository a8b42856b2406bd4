"""Packing: whole samples next to each other in one micro-batch, with their recorded routes.

Two samples of one prompt (P tokens p0 p1; responses a0 a1 and b0 b1 b2), and a third sample (q0 q1, c0):

    samples, concatenated   p0 p1 a0 a1 | p0 p1 b0 b1 b2 | q0 q1 c0
    index in it              0  1  2  3    4  5  6  7  8    9 10 11

    pack, nothing shared    p0 p1 a0 a1 | p0 p1 b0 b1 b2 | q0 q1 c0       lengths (4, 5, 3)
    pack, prompt shared     p0 p1 | a0 a1 | b0 b1 b2 | q0 q1 c0           lengths (2, 2, 3, 3)
    source_T                 0  1    2  3    6  7  8    9 10 11           index of each packed token above
    recorded routes         r0 r1   r2 --   r6 r7 --   r9 r10 --          rows of the samples at source_T

    labels_N                a0 a1    b0 b1 b2    c0                       tokens that the policy wrote
    rows_N                   1  2     1  4  5     8                       the packed token that predicts each label

Row 1, the last token of the shared prompt, predicts the first token of both responses. A sample has no route for its
last token, which the engine never reads; the router chooses there (-1).

With a shared prompt, one forward pass computes the prompt once. Each response attends to the prompt and to itself.
Eight responses of 16 tokens to a prompt of 40 are 168 tokens instead of 448, and give the same numbers. For a prompt
p0 p1 and the responses a0 a1 and b0:

    packed tokens   p0 p1 | a0 a1 | b0
    positions        0  1 |  2  3 |  2
    keys read       p0 p1 | p0 p1 a0 a1 | p0 p1 b0

T packed tokens, N policy-written tokens of a pack, A experts per token. In `SharedPromptContext`: S keys gathered for
all queries, N query heads, G key/value heads, K key dim, V value dim.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from openmimo.core.samples import Sample
from openmimo.model.context import PackedContext, RotaryTables, RoutingTape, SeenKeys
from openmimo.model.mimo import MiMo

NOT_RECORDED = -1


@dataclass(frozen=True)
class PromptGroup:
    """The token counts of a prompt and of the responses that share it.

    Attributes:
        prompt: Tokens of the prompt, or of the whole sample if there are no responses.
        responses: Tokens after the prompt in each sample; empty for one whole sample.
    """

    prompt: int
    responses: tuple[int, ...] = ()


class SharedPromptContext(PackedContext):
    """The packed context of prompt groups: each prompt, followed by its responses."""

    def __init__(
        self,
        groups: tuple[PromptGroup, ...],
        *,
        device: torch.device | str = "cpu",
        routing: RoutingTape | None = None,
    ):
        lengths = tuple(length for group in groups for length in (group.prompt, *group.responses))
        super().__init__(lengths, device=device, routing=routing)
        positions, keys, key_lengths, start = [], [], [], 0
        for group in groups:
            prompt = range(start, start + group.prompt)
            positions.append(torch.arange(group.prompt))
            keys.append(torch.arange(prompt.start, prompt.stop))
            key_lengths.append(group.prompt)
            start = prompt.stop
            for length in group.responses:
                positions.append(torch.arange(group.prompt, group.prompt + length))
                keys += [torch.arange(prompt.start, prompt.stop), torch.arange(start, start + length)]
                key_lengths.append(group.prompt + length)
                start += length
        self.positions_T = torch.cat(positions).to(device)
        self._rotary = RotaryTables(self.positions_T)
        self._keys_S, self._key_lengths = torch.cat(keys).to(device), tuple(key_lengths)

    def _seen(self, k_TGK: torch.Tensor, v_TGV: torch.Tensor, window_keys: int | None) -> SeenKeys:
        keys_S = self._keys_S
        return SeenKeys(k_TGK.index_select(0, keys_S), v_TGV.index_select(0, keys_S), self._key_lengths)


@dataclass(frozen=True)
class PackedSamples:
    """Whole samples of one forward pass, and where their policy-written tokens are.

    Attributes:
        samples: The samples, in order.
        tokens_T: int64 [T], the packed tokens.
        groups: The layout of the pack: a prompt and the responses that share it, or one whole sample.
        source_T: int64 [T], the index of each packed token in the concatenated samples.
        rows_N: int64 [N], the packed token that predicts each policy-written token.
        labels_N: int64 [N], the policy-written tokens.
        sequence_N: int64 [N], the index of each token's sample in `samples`.
        temperature_N: float32 [N], the temperature at which each token was sampled.
    """

    samples: list[Sample]
    tokens_T: torch.Tensor
    groups: tuple[PromptGroup, ...]
    source_T: torch.Tensor
    rows_N: torch.Tensor
    labels_N: torch.Tensor
    sequence_N: torch.Tensor
    temperature_N: torch.Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each piece of the pack. A piece is one sample where no prompt is shared."""
        return tuple(length for group in self.groups for length in (group.prompt, *group.responses))

    def context(self, routing: RoutingTape | None = None) -> PackedContext:
        """The model's inputs other than the tokens: positions, attention and expert routing."""
        if any(group.responses for group in self.groups):
            return SharedPromptContext(self.groups, device=self.tokens_T.device, routing=routing)
        return PackedContext(self.lengths, device=self.tokens_T.device, routing=routing)

    def routes(self, model: MiMo) -> dict[int, torch.Tensor]:
        """The recorded routes of the packed tokens by layer, int16 [T, A]; see `replayed_routes`."""
        return replayed_routes(model, self.samples, source_T=self.source_T)

    def written(self, values: Callable[[Sample], np.ndarray], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The entries of the policy-written tokens in a per-token array of each sample, [N]."""
        kept = np.concatenate([np.asarray(values(sample))[sample.loss_mask] for sample in self.samples])
        return torch.from_numpy(kept).to(self.tokens_T.device, dtype)


def packs(
    samples: Iterable[Sample],
    tokens_per_pack: int,
    *,
    device: torch.device,
    key: Callable[[Sample], str] = lambda sample: "",
    share_prompts: bool = False,
) -> Iterable[PackedSamples]:
    """Pack whole samples in order; see `divide_into_packs`.

    Args:
        samples: The samples.
        tokens_per_pack: The largest number of packed tokens, unless one sample alone has more.
        device: The device of the packed tensors.
        key: Samples with different keys are never in one pack.
        share_prompts: Adjacent samples with the same prompt, routed the same, compute the prompt once.
    """
    for members in divide_into_packs(samples, tokens_per_pack, key=key, share_prompts=share_prompts):
        yield pack_samples(members, device=device, share_prompts=share_prompts)


def divide_into_packs(
    samples: Iterable[Sample],
    tokens_per_pack: int,
    *,
    key: Callable[[Sample], str] = lambda sample: "",
    share_prompts: bool = False,
) -> Iterable[list[Sample]]:
    """The samples of each pack, in order. A pack takes samples while they fit, and at least one."""
    waiting: list[Sample] = []
    size = 0
    for sample in samples:
        new = len(sample)
        if share_prompts and waiting and _have_one_prompt(waiting[-1], sample):
            new -= sample.prompt_length
        if waiting and (size + new > tokens_per_pack or key(waiting[0]) != key(sample)):
            yield waiting
            waiting, size, new = [], 0, len(sample)
        waiting.append(sample)
        size += new
    if waiting:
        yield waiting


def pack_samples(samples: list[Sample], *, device: torch.device, share_prompts: bool = False) -> PackedSamples:
    """Make one pack of all samples.

    Raises:
        ValueError: A loss mask includes the first token of its sample, which nothing predicts.
    """
    groups, source, rows = [], [], []
    sample_start = pack_start = 0  # of the next sample: in the concatenated samples, and in the pack
    for members in _members(samples, share_prompts):
        prompt = len(members[0]) if len(members) == 1 else members[0].prompt_length
        source.append(np.arange(sample_start, sample_start + prompt))
        response_start, responses = pack_start + prompt, []
        for sample in members:
            responses.append(len(sample) - prompt)
            source.append(np.arange(sample_start + prompt, sample_start + len(sample)))
            before = _written_positions(sample) - 1
            rows.append(np.where(before < prompt, pack_start + before, response_start + before - prompt))
            sample_start += len(sample)
            response_start += responses[-1]
        groups.append(PromptGroup(prompt, tuple(responses) if len(members) > 1 else ()))
        pack_start = response_start
    tokens = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    labels = np.concatenate([sample.token_ids[sample.loss_mask] for sample in samples]).astype(np.int64)
    counts = torch.tensor([sample.num_answer_tokens for sample in samples], device=device)
    temperatures = torch.tensor([sample.temperature for sample in samples], dtype=torch.float32, device=device)
    source_T = np.concatenate(source)
    return PackedSamples(
        samples=samples,
        tokens_T=torch.from_numpy(tokens[source_T]).to(device),
        groups=tuple(groups),
        source_T=torch.from_numpy(source_T).to(device),
        rows_N=torch.from_numpy(np.concatenate(rows)).to(device),
        labels_N=torch.from_numpy(labels).to(device),
        sequence_N=torch.arange(len(samples), device=device).repeat_interleave(counts),
        temperature_N=temperatures.repeat_interleave(counts),
    )


def _members(samples: list[Sample], share_prompts: bool) -> list[list[Sample]]:
    """Adjacent samples with the same prompt together, if prompts are shared; otherwise each sample alone."""
    members: list[list[Sample]] = []
    for sample in samples:
        if share_prompts and members and _have_one_prompt(members[-1][-1], sample):
            members[-1].append(sample)
        else:
            members.append([sample])
    return members


def _have_one_prompt(one: Sample, other: Sample) -> bool:
    """Whether the tokens before the first written one, and their routes, are equal; False if nothing was written."""
    length = one.prompt_length
    if length == len(one) or length != other.prompt_length or length == len(other):
        return False
    if not np.array_equal(one.token_ids[:length], other.token_ids[:length]):
        return False
    routes, other_routes = one.routes, other.routes
    if routes is None or other_routes is None:
        return routes is other_routes
    return np.array_equal(routes[:length], other_routes[:length])


def _written_positions(sample: Sample) -> np.ndarray:
    if sample.loss_mask[:1].any():
        raise ValueError(f"The loss mask of a sample of group {sample.group!r} includes its first token.")
    return np.flatnonzero(sample.loss_mask)


def replayed_routes(
    model: MiMo, samples: list[Sample], *, source_T: torch.Tensor | None = None
) -> dict[int, torch.Tensor]:
    """The recorded routes of samples by layer, int16 [T, A]. Where a token has none, -1: the router chooses.

    Args:
        model: The model that replays them.
        samples: The samples.
        source_T: Indices of the tokens to take from the concatenated samples (None: all).

    Raises:
        ValueError: The routes do not have the layers or experts per token of this model.
    """
    layers = sorted(model.routers())
    if not layers or all(sample.routed_experts is None for sample in samples):
        return {}
    assert model.config.moe is not None, "a model with routers has an expert configuration"
    total = sum(map(len, samples))
    routes_TLA = np.full((total, len(layers), model.config.moe.experts_per_token), NOT_RECORDED, dtype=np.int16)
    start = 0
    for sample in samples:
        rows = routes_TLA[start : start + len(sample)]
        start += len(sample)
        recorded = sample.routes
        if recorded is not None:
            if recorded.shape[1:] != rows.shape[1:] or len(recorded) > len(rows):
                raise ValueError(
                    f"A sample of group {sample.group!r} has routes of shape {recorded.shape}; its {len(rows)} "
                    f"tokens and this model need at most {rows.shape}."
                )
            rows[: len(recorded)] = recorded
    routes = torch.from_numpy(routes_TLA)
    if source_T is not None and len(source_T) < total:
        routes = routes[source_T.cpu()]
    routes = routes.to(model.device)
    return {layer: routes[:, index] for index, layer in enumerate(layers)}
