"""The same code on an accelerator: kernels against their references, the model against the CPU, training, decoding.

`pytest -m gpu` runs these tests on a machine with an accelerator.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_model

import openmimo
from openmimo.core.records import Request, SamplingParams
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.engine.sampler import RowChange, SamplingInput, SamplingTable, decide, seat_sampling
from openmimo.kernels.attention import ATTENTION, PAGED_ATTENTION, AttentionNeed, PagedNeed, Pages
from openmimo.kernels.operations import (
    EXPERTS,
    ROUTER,
    ExpertsNeed,
    RoutingRule,
    route,
    token_logprobs,
    token_loss,
)
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


PAGED_CALLS = {  # query lengths, key lengths, query heads, key/value heads, key dim, value dim, window, sink
    "decode": ((1, 1, 1), (50, 1301, 9), 8, 2, 192, 128, None, True),
    "window": ((1, 1), (300, 9), 64, 8, 192, 128, 128, True),
    "verify": ((4, 2, 16), (1300, 7, 640), 64, 4, 192, 128, None, False),
    "small dims": ((3, 1), (130, 77), 4, 2, 48, 32, 33, True),
    "no queries": ((1, 0, 2), (40, 0, 90), 8, 2, 64, 64, None, True),
    "unaligned dims": ((1, 4), (130, 77), 8, 2, 24, 16, None, True),
    "unaligned dims in a window": ((3, 1), (130, 77), 8, 2, 24, 16, 33, True),
}


@pytest.mark.parametrize(
    "dtype, cached", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn")]
)
@pytest.mark.parametrize("call", PAGED_CALLS)
def test_paged_attention(device, call, dtype, cached):
    query_lengths, key_lengths, N, G, K, V, window_keys, has_sink = PAGED_CALLS[call]
    dtype, cached, P = getattr(torch, dtype), getattr(torch, cached), 16
    counts = [-(-length // P) for length in key_lengths]
    order = torch.randperm(sum(counts)).int()
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = order[sum(counts[:row]) : sum(counts[:row]) + count]
    keys, values = (torch.randn(sum(counts), P, G, dim, device=device).to(dtype).to(cached) for dim in (K, V))
    pages = Pages(keys, values, tables.to(device))
    q = torch.randn(sum(query_lengths), N, K, device=device).to(dtype)
    sink = torch.randn(N, device=device) if has_sink else None
    lengths = {
        "query_lengths_B": torch.tensor(query_lengths, dtype=torch.int32, device=device),
        "key_lengths_B": torch.tensor(key_lengths, dtype=torch.int32, device=device),
        "longest_query": max(query_lengths),
        "longest_key": max(key_lengths),
    }
    name, backend = PAGED_ATTENTION.choose(PagedNeed(max(query_lengths), K, V, False, dtype, cached, False))
    out = backend.run(q, pages, sink, window_keys=window_keys, **lengths).out_TNV
    kept = [row for row, length in enumerate(query_lengths) if length]
    exact = dict(PAGED_ATTENTION.backends())["reference"].run(
        q.double(),
        Pages(keys.to(dtype).double(), values.to(dtype).double(), pages.tables_BY[kept]),
        sink,
        query_lengths_B=lengths["query_lengths_B"][kept],
        key_lengths_B=lengths["key_lengths_B"][kept],
        longest_query=lengths["longest_query"],
        longest_key=lengths["longest_key"],
        window_keys=window_keys,
    )
    assert name == "triton"
    assert relative(out, exact.out_TNV) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 64, 256])
def test_few_tokens_through_experts(device, tokens, dtype):
    E, A, D, F = 16, 4, 200, 72
    ids = torch.rand(tokens, E, device=device).topk(A).indices
    tensors = [torch.randn(tokens, D), torch.rand(tokens, A), torch.randn(E, 2 * F, D), torch.randn(E, D, F)]
    x, weights, gate_up, down = (tensor.to(device) for tensor in tensors)
    x, gate_up, down = x.to(dtype), (0.1 * gate_up).to(dtype), (0.1 * down).to(dtype)
    need = ExpertsNeed(tokens, E, A, D, F, dtype, False, False)
    name, backend = EXPERTS.choose(need)
    out = backend.run(x, ids, weights, gate_up, down, need=need)
    wide = (x.double(), ids, weights.double(), gate_up.double(), down.double())
    exact = dict(EXPERTS.backends())["reference"].run(*wide, need=need)
    assert name == "triton"
    assert relative(out, exact) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    alone = backend.run(x[:1], ids[:1], weights[:1], gate_up, down, need=need._replace(num_tokens=1))
    assert torch.equal(alone[0], out[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routes(device, dtype):
    x, weight = torch.randn(70, 300, device=device).to(dtype), torch.randn(48, 300, device=device)
    bias, rule = torch.randn(48, device=device), RoutingRule(6, routed_scale=2.5)
    with torch.inference_mode():
        ids, weights, _ = route(x, weight, bias, rule)
    exact_ids, exact_weights, _ = dict(ROUTER.backends())["reference"].run(
        x.double(), weight.double(), bias.double(), rule, None, False
    )
    assert torch.equal(ids, exact_ids)
    assert relative(weights, exact_weights) < 1e-5


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


def test_captured_graphs_change_no_token(device):
    """Decoding passes are padded to few shapes; the bits of a row do not depend on them."""
    model = tiny_model(mtp_heads=3).to(device, torch.bfloat16)
    prompts = [tuple(range(5, 60)), (3, 4, 5), tuple(range(100, 20, -1))]
    texts = {}
    for graphs in (True, False):
        for speculative in (True, False):
            engine = Engine(model, config=EngineConfig(graphs=graphs, speculative=speculative, cache_gigabytes=0.1))
            params = SamplingParams(max_tokens=60, temperature=1.0, seed=1, ignore_eos=True)
            states = [engine.submit(Request(str(row), prompt, params)) for row, prompt in enumerate(prompts)]
            while engine.has_work:
                engine.step()
            assert (engine._runner.worker.graphs is not None) == graphs
            assert not graphs or engine._runner.worker.graphs.num_captured >= 1
            texts[graphs, speculative] = [state.tokens for state in states]
    assert texts[True, False] == texts[False, False]
    assert texts[True, True] == texts[False, True]


def test_planning_ahead_changes_no_token(device):
    """Texts that end by a token are computed for one step more; prompts are read while others decode."""
    model = tiny_model().to(device, torch.bfloat16)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9, "logprobs": True},
        {"temperature": 0.8, "top_k": 9},
    ]
    texts = {}
    for ahead in (True, False):
        config = EngineConfig(plans_ahead=ahead, cache_gigabytes=0.1, prefill_tokens=64, mixed_prefill_tokens=32)
        engine = Engine(model, config=config)
        states = []
        for number in range(12):
            prompt = tuple(range(3 + number, 20 + 9 * number))
            stops = () if number % 4 == 3 else tuple(range(number, 160, 11))
            params = SamplingParams(max_tokens=40, seed=number, stop_token_ids=stops, **kinds[number % 3])
            states.append(engine.submit(Request(str(number), prompt, params)))
            engine.step()
        while engine.has_work:
            engine.step()
        texts[ahead] = [(state.tokens, state.finish_reason, list(state.logprobs)) for state in states]
    assert texts[True] == texts[False]
    assert {reason for _, reason, _ in texts[True]} == {"stop", "length"}


@pytest.mark.parametrize("window_keys", [None, 33, 128])
@pytest.mark.parametrize(
    "query_lengths, key_lengths",
    [((700,), (700,)), ((130, 1, 300, 64), (130, 1, 300, 64)), ((3, 200, 40), (900, 200, 1300))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(192, 128), (24, 16)])
def test_attention_of_prompts(device, dims, dtype, query_lengths, key_lengths, window_keys):
    (K, V), N, G = dims, 16, 2
    shapes = ((sum(query_lengths), N, K), (sum(key_lengths), G, K), (sum(key_lengths), G, V))
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    sink = torch.randn(N, device=device) if window_keys else None
    need = AttentionNeed(query_lengths, key_lengths, N, G, K, V, window_keys, sink is not None, False, dtype, False)
    name, backend = ATTENTION.choose(need)
    assert name == "triton_prompts"
    exact = dict(ATTENTION.backends())["reference"].run(
        q.double(), k.double(), v.double(), None if sink is None else sink.double(), need=need, scale=K**-0.5
    )
    out = backend.run(q, k, v, sink, need=need, scale=K**-0.5).out_TNV
    assert relative(out, exact.out_TNV) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("tokens", [257, 3000])
def test_many_tokens_through_experts(device, tokens):
    E, A, D, F = 48, 6, 200, 72
    ids = torch.rand(tokens, E, device=device).topk(A).indices
    tensors = [
        torch.randn(tokens, D),
        torch.rand(tokens, A),
        0.1 * torch.randn(E, 2 * F, D),
        0.1 * torch.randn(E, D, F),
    ]
    x, weights, gate_up, down = (tensor.to(device) for tensor in tensors)
    x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    need = ExpertsNeed(tokens, E, A, D, F, torch.bfloat16, False, False)
    name, backend = EXPERTS.choose(need)
    out = backend.run(x, ids, weights, gate_up, down, need=need)
    wide = (x.double(), ids, weights.double(), gate_up.double(), down.double())
    assert name == "triton_grouped"
    assert relative(out, dict(EXPERTS.backends())["reference"].run(*wide, need=need)) < 1e-2


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
    seat = seat_sampling(0, params, device=device)
    masks = (allowed, torch.zeros_like(allowed))
    rows, numbers = torch.zeros(2, dtype=torch.int64, device=device), torch.full((2,), 0.3, device=device).double()
    sampling = SamplingInput(
        (seat,),
        seats_S=rows if temperature else None,
        uniform_S=numbers if temperature else None,
        changes=tuple(
            RowChange(row, 0, allowed_bits=np.packbits(mask, bitorder="little")) for row, mask in enumerate(masks)
        ),
    )
    table = SamplingTable(50, device)
    table.update(sampling)
    assert decide(logits, sampling, table, rows).tolist() == [17, -1]
