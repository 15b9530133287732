# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The gradient of factors of plugins, against that which autograd finds through the composed weight."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import make_model, make_plugins
from torch import nn

from tocom_hf import TocomModel, UnsupportedModelError, fit_scales
from tocom_hf.scales.composed_weights import ComposedWeight, FactorGradients


@pytest.fixture
def parts():
    """Frozen weight, lora_A, lora_B and factors of three columns, in float64."""
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in ((7, 5), (3, 5), (7, 3), (3,))]


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_those_through_the_composed_weight(parts, with_bias, keywords):
    frozen, lora_A, lora_B, factors = parts
    bias = torch.randn(7, dtype=torch.float64) if with_bias else None
    found = []
    for is_reference in (True, False):
        inputs = torch.linspace(-1, 1, 40, dtype=torch.float64).view(2, 4, 5).requires_grad_()
        own = factors.clone().requires_grad_()
        if is_reference:
            outputs = F.linear(inputs, frozen + lora_B @ torch.diag(own) @ lora_A, bias)
        else:
            composed = ComposedWeight.of(frozen, lora_A, lora_B, own)
            with FactorGradients({"name": composed}) as mode:
                arguments = {"weight": composed.weight, "bias": bias}
                outputs = F.linear(inputs, **arguments) if keywords else F.linear(inputs, *arguments.values())
            assert not mode.unused
        outputs.square().sum().backward()
        found.append((outputs.detach(), inputs.grad, own.grad.double()))
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_weight_whose_factors_are_zero_is_the_frozen_one(parts, dtype):
    """In whatever precision the model has, and the plugins not."""
    frozen, lora_A, lora_B, factors = parts
    composed = ComposedWeight.of(frozen.to(dtype), lora_A.float(), lora_B.float(), 0 * factors.float())
    assert torch.equal(composed.weight, frozen.to(dtype))


def test_other_layers_are_left_alone(parts):
    frozen, lora_A, lora_B, factors = parts
    composed = ComposedWeight.of(frozen, lora_A, lora_B, factors.requires_grad_())
    other = nn.Linear(5, 7, dtype=torch.float64)
    with FactorGradients({"name": composed}) as mode:
        other(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    assert mode.unused == {"name"}
    assert other.weight.grad.abs().sum() > 0
    assert factors.grad is None


def test_a_weight_that_no_linear_layer_uses_is_an_error():
    """Its factors would stay at one, as if that were the best."""

    class Elsewise(nn.Linear):
        def forward(self, hidden_states):
            return hidden_states @ self.weight.T + self.bias

    model = make_model(num_hidden_layers=1)
    plugins = make_plugins(model)
    model.vit.layers[0].attention.q_proj.__class__ = Elsewise
    tocom = TocomModel.from_pretrained(model, plugins=plugins, source_r=2)
    with pytest.raises(UnsupportedModelError, match=r"does not use .*q_proj\.weight as the weight of a linear layer"):
        fit_scales(tocom, [{"pixel_values": torch.rand(3, 32, 32)}], max_steps=1)
