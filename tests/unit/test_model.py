"""Parts of the model that transformers does not have: MTP heads, routing tape, balance, packing, dtypes."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config, tiny_model

from openmimo.core.errors import ConfigError
from openmimo.model.attention import attention_kind, keys_within
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.config import MTPConfig, training_flops_per_token
from openmimo.model.context import PackedContext, RouterLoss, RoutingTape
from openmimo.model.heads import shift_within_documents
from openmimo.model.mimo import MiMo
from openmimo.model.moe import balance_loss
from openmimo.model.presets import tiny, tiny_all_global


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_packed_documents_do_not_see_each_other():
    model = tiny_model(mtp_heads=2)
    parts = [ids_of(length, seed) for seed, length in enumerate((50, 1, 33))]
    tokens, lengths = torch.cat(parts), tuple(map(len, parts))
    context = PackedContext(lengths)
    hidden = model(tokens, context)
    drafts = model.mtp(1, hidden, shift_within_documents(tokens, lengths, by=2, fill=0), context)
    start = 0
    for part in parts:
        alone_context = PackedContext((len(part),))
        alone = model(part, alone_context)
        rows = slice(start, start + len(part))
        assert torch.allclose(hidden.post_norm_TD[rows], alone.post_norm_TD, atol=1e-5)
        shifted = shift_within_documents(part, (len(part),), by=2, fill=0)
        assert torch.allclose(drafts[rows], model.mtp(1, alone, shifted, alone_context), atol=1e-5)
        start += len(part)


def test_shift_stays_within_documents():
    shifted = shift_within_documents(torch.tensor([1, 2, 3, 4, 5, 6]), (4, 1, 1), by=2, fill=-1)
    assert shifted.tolist() == [3, 4, -1, -1, -1, -1]


@torch.no_grad()
@pytest.mark.parametrize("source", ["pre_norm", "post_norm"])
def test_an_mtp_head_is_its_equations(source):
    """Head k at i reads (token i+1+k, state i): embedding first, then state, one attention layer, one FFN, its norm."""
    config = tiny_config(mtp_heads=2)
    model = tiny_model(mtp_heads=2)
    model.config = replace(config, mtp=replace(config.mtp, hidden=source))
    tokens = ids_of(40)
    context = PackedContext((40,))
    hidden = model(tokens, context)
    state = hidden.pre_norm_TD if source == "pre_norm" else hidden.post_norm_TD
    shifted = torch.cat([tokens[2:], torch.zeros(2, dtype=torch.int64)])
    block = model.model.mtp.layers[1]

    def norm(module, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * module.weight

    embedded = model.model.embed_tokens.weight[shifted]
    x = torch.cat([norm(block.enorm, embedded), norm(block.hnorm, state)], dim=-1) @ block.eh_proj.weight.T
    x = x + block.self_attn(norm(block.input_layernorm, x), context)
    y = norm(block.pre_mlp_layernorm, x)
    mlp = block.mlp
    y = (torch.nn.functional.silu(y @ mlp.gate_proj.weight.T) * (y @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    assert torch.allclose(model.mtp(1, hidden, shifted, context), norm(block.final_layernorm, x + y), atol=1e-4)


def test_mtp_heads_replicate_into_equal_and_separate_copies():
    model = tiny_model(mtp_heads=1)
    model.replicate_mtp_heads(3)
    first, *others = model.model.mtp.layers
    assert model.config.num_mtp_heads == len(others) + 1 == 3
    for other in others:
        for name, parameter in first.named_parameters():
            copy = other.get_parameter(name)
            assert torch.equal(parameter, copy)
            assert parameter.data_ptr() != copy.data_ptr()


class TestRouting:
    def run(self, model, tokens, tape):
        return model(tokens, PackedContext((len(tokens),), routing=tape)).post_norm_TD

    @torch.no_grad()
    def test_replay_repeats_the_choice_after_the_router_has_changed(self):
        model, tokens = tiny_model(), ids_of(60)
        tape = RoutingTape(record=True)
        self.run(model, tokens, tape)
        for router in model.routers().values():
            router.e_score_correction_bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(1)))
        own = RoutingTape(record=True)
        self.run(model, tokens, own)
        replayed = RoutingTape(record=True, replayed=tape.recorded)
        self.run(model, tokens, replayed)
        assert any(not torch.equal(own.recorded[layer], ids) for layer, ids in tape.recorded.items())
        assert all(torch.equal(replayed.recorded[layer], ids) for layer, ids in tape.recorded.items())
        assert set(tape.recorded) == set(model.routers())

    @torch.no_grad()
    def test_minus_one_falls_back_to_the_own_choice(self):
        model, tokens = tiny_model(), ids_of(60)
        own = RoutingTape(record=True)
        expected = self.run(model, tokens, own)
        none = {layer: torch.full_like(ids, -1) for layer, ids in own.recorded.items()}
        assert torch.equal(self.run(model, tokens, RoutingTape(replayed=none)), expected)

    def test_gradients_reach_the_router_through_replayed_choices(self):
        model, tokens = tiny_model(), ids_of(60)
        replayed = {layer: torch.randint(0, 8, (60, 2)) for layer in model.routers()}
        replayed = {layer: torch.stack([ids[:, 0], (ids[:, 0] + 1) % 8], dim=1) for layer, ids in replayed.items()}
        self.run(model, tokens, RoutingTape(replayed=replayed)).square().sum().backward()
        assert all(router.weight.grad.abs().sum() > 0 for router in model.routers().values())

    def test_checkpointing_records_once_and_gives_the_same_gradients(self):
        gradients, tapes = [], []
        for recompute in (False, True):
            model, tokens, tape = tiny_model(), ids_of(60), RoutingTape(record=True)
            if recompute:
                checkpoint_activations(model.model)
            self.run(model, tokens, tape).square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            tapes.append(tape.recorded)
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(tapes[0][layer], tapes[1][layer]) for layer in tapes[0])


def test_selection_bias_moves_towards_even_load():
    router = tiny_model().routers()[1]
    before = router.e_score_correction_bias.clone()
    router.update_selection_bias(torch.tensor([100, 0, 10, 10, 10, 10, 10, 10]), rate=0.01)
    change = router.e_score_correction_bias - before
    assert change[0] < 0 < change[1]
    assert abs(change.mean()) < 1e-7
    router.update_selection_bias(torch.full((8,), 5), rate=0.01)
    assert torch.allclose(router.e_score_correction_bias - before, change)


def test_the_selection_bias_changes_choices_but_not_weights():
    model = tiny_model()
    router, x = model.routers()[1], torch.randn(30, 64)
    context = PackedContext((30,))
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[3] = 100.0
    ids, weights = router(x, context)
    assert (ids == 3).any(dim=1).all()
    scores = (x @ router.weight.T).sigmoid().gather(1, ids)
    assert torch.allclose(weights, scores / scores.sum(-1, keepdim=True), atol=1e-6)


def test_balance_loss_by_hand():
    scores = torch.rand(7, 4)
    ids = scores.topk(2).indices
    sequence = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    expected = 0.0
    for number in range(2):
        rows = [row for row in range(7) if sequence[row] == number]
        for expert in range(4):
            frequency = sum(int(expert in ids[row]) for row in rows) * 4 / (2 * len(rows))
            probability = sum(float(scores[row, expert] / scores[row].sum()) for row in rows) / len(rows)
            expected += frequency * probability / 2
    balance = RouterLoss(1.0, sequence, 2)
    assert abs(balance_loss(scores, ids, balance, layer=1).item() - expected) < 1e-5


def test_the_balance_loss_reaches_the_router_and_nothing_but_gradients():
    model, tokens = tiny_model(), ids_of(40)
    plain = model(tokens, PackedContext((40,))).post_norm_TD
    balanced = model(tokens, PackedContext((40,), balance_weight=1.0)).post_norm_TD
    assert torch.equal(plain, balanced)
    (balanced * 0).sum().backward()
    assert model.routers()[1].weight.grad.abs().sum() > 0


def test_bfloat16_activations_over_float32_weights():
    model = tiny_model(mtp_heads=1)
    model.compute_dtype = torch.bfloat16
    hidden = model(ids_of(40), PackedContext((40,)))
    assert hidden.post_norm_TD.dtype == torch.bfloat16
    hidden.post_norm_TD.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_initialization_has_the_reports_standard_deviation():
    model = MiMo(replace(tiny(), init_std=0.006))
    model.initialize(torch.Generator().manual_seed(0))
    assert model.model.layers[1].mlp.experts.gate_up_proj.std().item() == pytest.approx(0.006, rel=0.02)
    assert model.model.layers[1].mlp.gate.weight.std().item() == pytest.approx(0.006, rel=0.1)
    assert torch.equal(model.model.norm.weight, torch.ones(128))


def test_flops_are_counted_like_matrix_products():
    """Windows make long sequences cheaper: at 4096 tokens the hybrid model needs fewer FLOPs than an all-global one."""
    hybrid, all_global = tiny(), tiny_all_global()
    assert training_flops_per_token(hybrid, 4096) < 0.7 * training_flops_per_token(all_global, 4096)
    dense = 2 * 3 * (3 * 128 * 256)
    wider = replace(hybrid, mtp=None)
    one_more = replace(wider, layers=(wider.layers[0], *wider.layers))
    per_layer = training_flops_per_token(one_more, 64) - training_flops_per_token(wider, 64)
    attention = 2 * 3 * (128 * (4 * 48 + 48 + 32) + 4 * 32 * 128) + 3 * 2 * 4 * (48 + 32) * 32.5
    assert per_layer == pytest.approx(dense + attention)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: replace(c, moe=None), "moe"),
        (lambda c: replace(c, moe=replace(c.moe, experts_per_token=9)), "experts_per_token"),
        (lambda c: replace(c, mtp=MTPConfig(1, c.layers[1].attention, hidden="both")), "mtp.hidden"),
        (lambda c: replace(c, family="llama"), "family"),
        (lambda c: c.with_mtp_heads(2), "MTP"),
    ],
)
def test_impossible_models_are_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        change(tiny_config())


@pytest.mark.parametrize("most", [None, 1, 2, 7, 40])
def test_the_keys_of_a_sequence_are_those_of_its_positions(most):
    for length in (1, 2, 6, 7, 8, 33):
        loop = sum(position + 1 if most is None else min(position + 1, most) for position in range(length))
        assert keys_within(length, most) == loop


def test_each_kind_counts_the_keys_that_its_queries_read():
    window, selected, length = 5, 9, 23
    spec = replace(tiny().layers[0].attention, window_keys=window, selected_keys=selected)
    expected = {
        "full": sum(position + 1 for position in range(length)),
        "alibi": sum(position + 1 for position in range(length)),
        "sliding": sum(min(position + 1, window) for position in range(length)),
        "sparse": sum(min(position + 1, selected) + min(position + 1, window) for position in range(length)),
    }
    assert {kind: attention_kind(kind).visible_keys(spec, length) for kind in expected} == expected
