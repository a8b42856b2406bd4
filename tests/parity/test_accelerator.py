"""The same code on an accelerator: kernels against their references, the model against itself on the CPU, training,
decoding. `pytest -m gpu` runs this where there is one.
"""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model

import openmimo
from openmimo.core.records import SamplingParams
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.engine.llm import LLM
from openmimo.engine.sampler import Draw, LogitChange, decide, sampling_input
from openmimo.kernels.attention import ATTENTION, AttentionNeed
from openmimo.kernels.operations import EXPERTS, ExpertsNeed, token_logprobs, token_loss
from openmimo.model.context import PackedContext
from openmimo.runtime.device import resolve_device
from openmimo.train.config import EvaluationConfig, Phase, PretrainConfig, TokenizerConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device():
    found = resolve_device("auto")
    if found.type == "cpu":
        pytest.skip("no accelerator")
    return found


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("window_keys", [None, 33, 128])
@pytest.mark.parametrize("lengths", [(700,), (130, 1, 300, 64), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_forward_and_backward(device, window_keys, lengths, dtype):
    T, N, G, K, V = sum(lengths), 16, 2, 192, 128
    shapes = ((T, N, K), (T, G, K), (T, G, V))
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
    sink = torch.randn(N, device=device, requires_grad=True) if window_keys else None
    need = AttentionNeed(lengths, lengths, N, G, K, V, window_keys, sink is not None, True, dtype, False)
    inputs = [x for x in (q, k, v, sink) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = dict(ATTENTION.backends())["reference"]
    expected = reference.run(*exact[:3], exact[3] if sink is not None else None, need=need, scale=K**-0.5).out_TNV
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, exact, upstream)
    served = []
    for name, backend in ATTENTION.backends():
        if backend.refuse(need) or name == "reference":
            continue
        out = backend.run(q, k, v, sink, need=need, scale=K**-0.5).out_TNV
        gradients = torch.autograd.grad(out, inputs, upstream.to(dtype))
        limit = 2e-2 if dtype == torch.bfloat16 else 2e-4
        assert relative(out, expected) < limit, name
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            assert relative(ours, theirs) < 2 * limit, name
        served.append(name)
    assert served
    if window_keys is None and dtype == torch.bfloat16:
        assert ATTENTION.choose(need)[0] == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(device, dtype):
    T, E, A, D, F = 500, 16, 4, 64, 32
    ids = torch.rand(T, E, device=device).topk(A).indices
    tensors = [torch.randn(T, D), torch.rand(T, A), 0.1 * torch.randn(E, 2 * F, D), 0.1 * torch.randn(E, D, F)]
    x, weights, gate_up, down = (tensor.to(device).requires_grad_() for tensor in tensors)
    need = ExpertsNeed(T, E, A, D, F, dtype, True, False)
    reference = dict(EXPERTS.backends())["reference"]
    expected = reference.run(x, ids, weights, gate_up, down, need=need)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, (x, weights, gate_up, down), upstream)
    name, backend = EXPERTS.choose(need)
    out = backend.run(x.to(dtype), ids, weights, gate_up.to(dtype), down.to(dtype), need=need)
    gradients = torch.autograd.grad(out, (x, weights, gate_up, down), upstream.to(dtype))
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert relative(ours, theirs) < (3e-2 if dtype == torch.bfloat16 else 1e-3), name
    assert name == ("grouped" if dtype == torch.bfloat16 else "sorted_loop")


def test_token_losses(device):
    hidden, weight = torch.randn(300, 64, device=device), torch.randn(5000, 64, device=device)
    labels = torch.randint(0, 5000, (300,), device=device)
    expected = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, labels[:, None])[:, 0]
    assert relative(token_logprobs(hidden, weight, labels), expected) < 1e-3
    loss = token_loss(hidden, weight, labels, torch.ones(300, device=device))
    assert relative(loss, -expected.sum()) < 1e-3


def test_model_is_itself_on_the_cpu(device):
    ids = torch.randint(0, 160, (200,))
    on_cpu, there = tiny_model(), tiny_model().to(device)
    with torch.no_grad():
        assert relative(there.logits(ids).cpu(), on_cpu.logits(ids)) < 1e-3
    for model in (on_cpu, there):
        context = PackedContext((120, 80), device=model.device, balance_weight=1e-2)
        model(ids.to(model.device), context).post_norm_TD.square().mean().backward()
    for (name, ours), theirs in zip(there.named_parameters(), on_cpu.parameters(), strict=True):
        if theirs.grad is not None:
            assert relative(ours.grad.cpu(), theirs.grad) < 1e-2, name


def test_decoding_plain_speculative_and_on_the_cpu(device, tmp_path):
    openmimo.save_model(tiny_model(mtp_heads=3), tmp_path)
    params = openmimo.SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    prompts = [list(range(5, 60)), [3, 4, 5], list(range(100, 20, -1))]
    texts = []
    for where, speculative in (("cpu", False), (str(device), False), (str(device), True)):
        llm = LLM(tmp_path, speculative=speculative, device=where)
        texts.append([completion.token_ids for completion in llm.generate(prompts, params)])
    assert texts[0] == texts[1] == texts[2]


def test_training_runs_and_resumes(device, tmp_path):
    from openmimo.train.pretrain import pretrain

    mixture = MixtureConfig((SourceConfig("python_stdlib", max_megabytes=0.5),), validation_fraction=0.1)
    stage = Phase(
        "s",
        steps=30,
        sequence_length=128,
        global_batch_size=8,
        learning_rate=3e-3,
        end_learning_rate=1e-3,
        mixture=mixture,
    )
    config = PretrainConfig(
        run_folder=str(tmp_path / "run"),
        stages=(stage,),
        evaluation=EvaluationConfig(every_steps=30, batches=1),
        tokenizer=TokenizerConfig(train_megabytes=0.5),
        log_every_steps=1,
    )
    pretrain(config)
    from openmimo.core.metrics import read_metrics

    losses = [row["loss/main"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/main" in row]
    assert losses[-1] < losses[0] - 1
    folder = pretrain(replace(config, loader_workers=1))
    assert LLM(folder, device=str(device)).generate(["def f("])[0].token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_of_structures_are_moved_to_the_logits(device, temperature):
    """The grammar library computes its masks on the CPU."""
    logits = torch.randn(2, 50, device=device)
    allowed = torch.zeros(50, dtype=torch.bool)
    allowed[17] = True
    params = SamplingParams(temperature=temperature, logit_bias={3: 100.0}, frequency_penalty=1.0)
    changes = [
        LogitChange(frozenset({1}), {2: 1}, frozenset({4}), mask) for mask in (allowed, torch.zeros_like(allowed))
    ]
    sampling = sampling_input([Draw(params, 0, 5, change) for change in changes], device)
    assert decide(logits, sampling).tolist() == [17, -1]
