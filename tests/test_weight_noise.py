# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Within a step the weights move as far as they were told to, in few directions; afterwards nothing has happened."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import make_model
from test_distillation import ARGUMENTS, Noise
from torch import nn

from tocom_hf import ArgumentError, DistillationArguments, distill
from tocom_hf.weight_noise import WeightNoise


@pytest.fixture
def layers(model):
    return model.requires_grad_(False).vit.layers


def changes(layers, noise, step):
    """By name, what a step adds to every weight."""
    before = copy.deepcopy(layers.state_dict())
    with noise.step(step):
        return {name: value - before[name] for name, value in copy.deepcopy(layers.state_dict()).items()}


def test_changes_are_of_low_rank_and_bounded_and_touch_linear_weights_alone(layers):
    noise, linear = (
        WeightNoise(layers, 0.25, seed=0),
        {n for n, m in layers.named_modules() if isinstance(m, nn.Linear)},
    )
    shares = []
    for step in range(8):
        found = changes(layers, noise, step)
        moved = {name for name, change in found.items() if change.any()}
        assert moved == {f"{name}.weight" for name in linear}
        relative = [(found[name].norm() / layers.state_dict()[name].norm()).item() for name in moved]
        assert max(relative) - min(relative) < 1e-5
        shares.append(relative[0])
        assert all(torch.linalg.matrix_rank(found[name], rtol=1e-4) <= 4 for name in moved)
    assert max(shares) < 0.25
    assert max(shares) - min(shares) > 0.05


def test_changes_depend_on_seed_and_step_alone(layers):
    noise = WeightNoise(layers, 0.2, seed=0)
    first, second = changes(layers, noise, 3), changes(layers, noise, 4)
    again = changes(layers, WeightNoise(layers, 0.2, seed=0), 3)
    other = changes(layers, WeightNoise(layers, 0.2, seed=1), 3)
    name = next(name for name, change in first.items() if change.any())
    assert torch.equal(first[name], again[name])
    assert not torch.allclose(first[name], second[name])
    assert not torch.allclose(first[name], other[name])


def test_weights_come_back_bit_for_bit_whatever_happens(layers):
    before = copy.deepcopy(layers.state_dict())
    with pytest.raises(KeyboardInterrupt), WeightNoise(layers, 0.2, seed=0).step(0):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


def test_distillation_uses_it_and_leaves_the_model_alone():
    model, arguments = make_model(), {**ARGUMENTS, "lora_dropout": 0.0}
    before = copy.deepcopy(model.state_dict())
    sets = [distill(model, Noise(), DistillationArguments(**arguments, weight_noise=w)) for w in (0.0, 0.2, 0.2)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain, noisy, again = (torch.cat([f.lora_B.flatten() for f in s.adapter(3).values()]) for s in sets)
    assert torch.equal(noisy, again)
    assert not torch.allclose(plain, noisy, rtol=0.01)
    assert sets[1].config.training["weight_noise"] == 0.2


def test_sharded_weights_are_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ArgumentError, match="FSDP shards them"):
        distill(make_model(), Noise(), DistillationArguments(**ARGUMENTS, weight_noise=0.1), accelerator)


def test_it_must_not_be_negative():
    with pytest.raises(ArgumentError, match="weight_noise must not be negative"):
        DistillationArguments(weight_noise=-0.1)
