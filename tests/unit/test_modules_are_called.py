"""Every use of the model calls its modules, so hooks and parametrizations of any module take effect."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config
from torch import nn
from torch.nn.utils import parametrize

from openmimo.core.records import SamplingParams
from openmimo.core.samples import Sample
from openmimo.engine.llm import LLM
from openmimo.model.context import PackedContext
from openmimo.model.heads import micro_batch
from openmimo.model.layers import Linear
from openmimo.model.mimo import MiMo
from openmimo.rl.learning.policy_trainer import PolicyTrainer, weighted_sum
from openmimo.train.config import OptimizerConfig
from openmimo.train.loss import training_loss

PROMPT = [5, 17, 3, 99, 42, 8, 61, 12, 30, 7]


class Counting(nn.Module):
    """The identity; counts under a name how often a weight is read."""

    def __init__(self, name: str, counts: Counter):
        super().__init__()
        self._name, self._counts = name, counts

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        self._counts[self._name] += 1
        return tensor.view_as(tensor)


def parametrized(model: MiMo) -> tuple[set[str], Counter]:
    """Parametrizes every parameter of every module. Returns the modules that own one, and the counts of reads."""
    counts: Counter = Counter()
    owners = [(name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    for name, module in owners:
        for own_name, _ in list(module.named_parameters(recurse=False)):
            parametrize.register_parametrization(module, own_name, Counting(name, counts))
    counts.clear()
    return {name for name, _ in owners}, counts


def hooked(model: MiMo) -> tuple[set[str], Counter]:
    """Hooks every module of the model. Returns their names, and the counts of calls."""
    counts: Counter = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, _name=name: counts.update([_name]))
    return {name for name, _ in model.named_modules()}, counts


def train(model: MiMo) -> list[torch.Tensor]:
    """Returns loss and gradient norms of a micro-batch."""
    tokens = torch.arange(40) * 7 % 160
    batch = micro_batch(tokens, (25, 15), None, model.config.num_mtp_heads)
    loss, shares = training_loss(
        model, batch, PackedContext((25, 15)), label_counts=batch.label_counts(), mtp_weight=0.3
    )
    loss.backward()
    norms = sorted(own.grad.norm().item() for own in model.parameters() if own.grad is not None)
    model.zero_grad(set_to_none=True)
    return [loss.detach(), shares, torch.tensor(norms)]


def policy_step(model: MiMo) -> list[torch.Tensor]:
    """An update with learning rate 0, which does not change the weights."""
    tokens = [*PROMPT, *range(50, 70)]
    mask = [False] * 10 + [True] * 20
    sample = Sample(tokens, mask, [-1.0] * 30, [0] * 30)
    sample = replace(sample, advantages=[1.0] * 30, weights=[0.05] * 30)
    trainer = PolicyTrainer(model, OptimizerConfig(weight_decay=0.0), mtp_weight=0.1)
    objective = weighted_sum(lambda batch: -batch.advantages_N * batch.logprobs_N)
    report = trainer.update([sample], objective, learning_rate=0.0, version=0)
    model.eval()
    return [torch.tensor(report.loss), torch.tensor(trainer.logprobs([sample])[0])]


def score(model: MiMo) -> list[torch.Tensor]:
    return [LLM(model).score(PROMPT)]


def prompt_logprobs(model: MiMo) -> list[torch.Tensor]:
    (completion,) = LLM(model, speculative=False).generate([PROMPT], SamplingParams(max_tokens=1, prompt_logprobs=True))
    return [torch.tensor(completion.prompt_logprobs)]


def decode(model: MiMo) -> list[torch.Tensor]:
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=True)
    (completion,) = LLM(model, speculative=False).generate([PROMPT], params)
    return [torch.tensor(completion.token_ids)]


def draft(model: MiMo) -> list[torch.Tensor]:
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=True)
    (completion,) = LLM(model, speculative=True, adaptive_drafts=False).generate([PROMPT], params)
    return [torch.tensor(completion.token_ids)]


USES = {
    "training": train,
    "training a policy": policy_step,
    "scoring": score,
    "scoring a prompt": prompt_logprobs,
    "decoding": decode,
    "drafting": draft,
}
WITH_MTP = {"training", "training a policy", "drafting"}


def model_with_every_part(**changes) -> MiMo:
    """A model with full and sliding layers, sinks, biases, experts and MTP heads."""
    return randomize(MiMo(replace(tiny_config(mtp_heads=2), attention_bias=True, **changes)), 0)


def expected_names(names: set[str], use: str) -> set[str]:
    return {name for name in names if use in WITH_MTP or ".mtp" not in name}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wrap", [parametrized, hooked], ids=["parametrizations", "forward hooks"])
def test_every_module_is_called_and_identities_change_no_bit(wrap, use):
    plain, wrapped = model_with_every_part(), model_with_every_part()
    names, counts = wrap(wrapped)
    # Containers that compute nothing are not called.
    names -= {name for name in names if isinstance(wrapped.get_submodule(name), nn.ModuleList)}
    ours, theirs = USES[use](wrapped), USES[use](plain)
    assert set(counts) >= expected_names(names, use), expected_names(names, use) - set(counts)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("use", ["training", "scoring", "decoding"])
def test_a_tied_head_reads_the_embedding_through_its_own_parametrization(use):
    plain, wrapped = (model_with_every_part(tie_embeddings=True) for _ in range(2))
    counts: Counter = Counter()
    parametrize.register_parametrization(wrapped.model.embed_tokens, "weight", Counting("embedding", counts))
    for one, other in zip(USES[use](wrapped), USES[use](plain), strict=True):
        assert torch.equal(one, other)
    assert counts["embedding"]


class Doubled(Linear):
    """A replaced projection, as an adapter library makes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_a_replaced_or_hooked_projection_takes_effect(name):
    layer_of = {"self_attn": 1, "mlp": 0}[name.split(".")[0]]
    tokens = torch.tensor(PROMPT)
    doubled, replaced, with_hook, with_forward = (model_with_every_part() for _ in range(4))
    own = [model.model.layers[layer_of].get_submodule(name) for model in (doubled, replaced, with_hook, with_forward)]
    for tensor in own[0].parameters():
        tensor.mul_(2)
    own[1].__class__ = Doubled
    own[2].register_forward_hook(lambda module, args, out: 2 * out)
    forward = own[3].forward
    own[3].forward = lambda x: 2 * forward(x)
    expected = doubled.logits(tokens)
    for model in (replaced, with_hook, with_forward):
        assert torch.equal(model.logits(tokens), expected)


@torch.no_grad()
def test_hooks_on_all_modules_see_the_projections_too():
    model, seen = model_with_every_part(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model.logits(torch.tensor(PROMPT))
    finally:
        handle.remove()
    main = [module for name, module in model.named_modules() if ".mtp" not in name]
    assert {id(module) for module in main} <= {id(module) for module in seen}


def test_backward_hooks_of_every_module_with_tensor_inputs_run():
    model = model_with_every_part()
    seen: Counter = Counter()
    names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    for name in names:
        model.get_submodule(name).register_full_backward_hook(lambda *_, _name=name: seen.update([_name]))
    train(model)
    assert set(seen) == set(names)
