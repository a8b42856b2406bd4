"""Projections of one input whose weights are adjacent in memory are one product."""

import copy

import torch
from conftest import tiny_model

from openmimo.engine.worker import join_memory
from openmimo.kernels.linear.reference import adjacent_rows
from openmimo.model.weight_formats import quantize_model

IDS = torch.arange(3, 40)


def projections(model):
    attention = model.model.layers[1].self_attn
    return tuple((layer.weight, None) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))


def test_adjacent_weights_are_one_matrix_and_the_parameters_stay():
    model = tiny_model(3)
    before = dict(model.named_parameters())
    with torch.no_grad():
        expected = model.logits(IDS)
        assert adjacent_rows(projections(model)) is None
        join_memory(model)
        joined = adjacent_rows(projections(model))
        assert torch.equal(joined, torch.cat([weight for weight, _ in projections(model)]))
        assert torch.equal(model.logits(IDS), expected)
        projections(model)[1][0].fill_(7.0)  # as new weights are copied in place
        assert (joined == 7.0).any() and adjacent_rows(projections(model)).data_ptr() == joined.data_ptr()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    dense = model.model.layers[0].mlp
    assert adjacent_rows(((dense.gate_proj.weight, None), (dense.up_proj.weight, None))) is not None


def test_other_orders_biases_copies_and_quantized_weights_are_not_joined():
    model = tiny_model(3)
    join_memory(model)
    layers = projections(model)
    assert adjacent_rows(layers[::-1]) is None
    assert adjacent_rows((layers[0], layers[2])) is None
    assert adjacent_rows((layers[0], (layers[1][0], torch.zeros(len(layers[1][0]))))) is None
    assert adjacent_rows(tuple((weight.double(), None) for weight, _ in layers)) is None
    other = copy.deepcopy(model)
    assert torch.equal(projections(other)[0][0], layers[0][0])
    assert projections(other)[0][0].data_ptr() != layers[0][0].data_ptr()
    quantize_model(model, "int8")
    codes = model.model.layers[1].self_attn.q_proj.weight.data_ptr()
    join_memory(model)
    assert model.model.layers[1].self_attn.q_proj.weight.data_ptr() == codes


def test_weights_inside_other_memory_stay_there():
    """Trainers on other processes may write to it."""
    model = tiny_model(3)
    shared = torch.cat([weight.detach().flatten() for weight, _ in projections(model)])
    start = 0
    for weight, _ in projections(model):
        weight.data = shared[start : start + weight.numel()].view_as(weight)
        start += weight.numel()
    join_memory(model)
    assert projections(model)[0][0].data_ptr() == shared.data_ptr()
