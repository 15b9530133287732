# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Branches in training are the plugins of the formula, with dropout that belongs to the image."""

import pytest
import torch
from helpers.models import make_model

from tocom_hf.distillation.branches import PluginChain
from tocom_hf.distillation.keyed_random import image_keys
from tocom_hf.merging.backbones import find_backbone


def trained(model, dropout=0.0):
    chain = PluginChain(find_backbone(model), max_r=4, rank=2, scale=0.1, dropout=dropout)
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return chain


def keys(count):
    return image_keys(0, torch.zeros(count, dtype=torch.long), torch.arange(count))


@pytest.mark.parametrize(("source_r", "target_r"), [(0, 4), (4, 0), (1, 2), (3, 1)])
@pytest.mark.parametrize("order", ["query, value", "value, query", "value of another input"])
def test_projections_add_the_signed_chain(source_r, target_r, order):
    """W x + s * sum_i B_i A_i x in float64, whichever projection is called first."""
    model = make_model()
    chain = trained(model)
    layer = model.vit.layers[1].attention
    chain.activate(source_r, target_r)
    inputs = torch.randn(3, 7, 32)
    other = inputs if order != "value of another input" else torch.randn(3, 7, 32)
    if order == "value, query":
        value, query = layer.v_proj(other), layer.q_proj(inputs)
    else:
        query, value = layer.q_proj(inputs), layer.v_proj(other)
    sign = 1 if target_r > source_r else -1
    for name, x, result in (("q_proj", inputs, query), ("v_proj", other, value)):
        base = getattr(layer, name).base
        weight = base.weight.double()
        for i in range(min(source_r, target_r), max(source_r, target_r)):
            lora_A, lora_B = chain.adapters()[i][f"layers.1.attention.{name}"]
            weight = weight + sign * 0.1 * lora_B.double() @ lora_A.double()
        expected = x.double() @ weight.T + base.bias.double()
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


def test_dropout_belongs_to_the_image_and_keeps_the_mean():
    model = make_model()
    layer, chain = model.vit.layers[0].attention, trained(model, dropout=0.25)
    inputs = torch.randn(1, 7, 32).expand(2000, 7, 32).contiguous()
    chain.activate(0, 4)
    without = layer.q_proj(inputs)
    chain.activate(0, 4, keys(2000))
    dropped = layer.q_proj(inputs)
    base = layer.q_proj.base(inputs)
    torch.testing.assert_close((dropped - base).mean(0), (without - base).mean(0), rtol=0.2, atol=0.02)
    assert (dropped != without).any(-1).float().mean() > 0.8
    chain.activate(0, 4, keys(2000)[500:503])
    torch.testing.assert_close(layer.q_proj(inputs[:3]), dropped[500:503], rtol=0, atol=1e-6)
    chain.eval()
    assert torch.equal(layer.q_proj(inputs[:3]), without[:3])


def test_layers_drop_differently():
    """Two layers with the same weights and plugins differ by what they drop."""
    model = make_model()
    one, other = (layer.attention for layer in model.vit.layers[:2])
    other.load_state_dict(one.state_dict())
    chain = trained(model, dropout=0.5)
    chain.layers[1].load_state_dict(chain.layers[0].state_dict())
    inputs = torch.ones(8, 3, 32)
    chain.activate(0, 4)
    assert torch.equal(one.q_proj(inputs), other.q_proj(inputs))
    chain.activate(0, 4, keys(8))
    assert not torch.equal(one.q_proj(inputs), other.q_proj(inputs))


def test_a_chain_takes_over_as_many_plugins_as_it_has():
    adapters = trained(make_model()).adapters()
    chain = PluginChain(find_backbone(make_model()), max_r=3, rank=2, scale=0.1, dropout=0.0)
    chain.start_from(adapters)
    for i, adapter in chain.adapters().items():
        for path, (lora_A, lora_B) in adapter.items():
            assert torch.equal(lora_A, adapters[i][path].lora_A)
            assert torch.equal(lora_B, adapters[i][path].lora_B)


def test_a_removed_chain_leaves_the_projections_as_they_were():
    model = make_model()
    before = dict(find_backbone(model).projections())
    trained(model).remove(find_backbone(model))
    assert all(module is before[path] for path, module in find_backbone(model).projections().items())
