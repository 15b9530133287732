# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Whatever runs a model in evaluation mode gives every part of it back in the mode that it was in."""

import pytest
import torch
from helpers.models import make_model, make_plugins

from tocom_hf import DistillationArguments, TocomModel, calibrate, distill, evaluate_degrees, fit_scales, pick_scale
from tocom_hf.devices import evaluation_mode
from tocom_hf.evaluation.grid import evaluate_checkpoint


IMAGES = [
    {"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), "labels": i % 5}
    for i in range(4)
]

JOBS = {
    "evaluate_degrees": lambda model: evaluate_degrees(model, IMAGES, [0, 2], batch_size=4),
    "evaluate_checkpoint": lambda model: evaluate_checkpoint(model, "it", [0, 2], IMAGES, IMAGES, scales=[0.1]),
    "pick_scale": lambda model: pick_scale(model, IMAGES, 2, scales=[0.1]),
    "fit_scales": lambda model: fit_scales(model, IMAGES, target_r=2, max_steps=1),
    "calibrate": lambda model: calibrate(model, degrees=[0, 2], seconds=0, progress=False),
}
ARGUMENTS = DistillationArguments(
    max_r=2, max_steps=1, per_device_train_batch_size=2, gradient_checkpointing=True, lora_dropout=0.0
)


def frozen_layer(model, training):
    """A model in one mode with one layer in the other."""
    model.train(training)
    model.vit.layers[1].train(not training)
    return model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_layer_keeps_its_mode(training):
    model = frozen_layer(make_model(), training)
    before = modes(model)
    with evaluation_mode(model) as same:
        assert same is model
        assert not any(modes(model).values())
    assert modes(model) == before


def test_the_modes_come_back_after_an_error():
    model = frozen_layer(make_model(), training=True)
    before = modes(model)
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert modes(model) == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("job", JOBS)
def test_jobs_give_every_part_back_in_its_mode(job, training):
    model = TocomModel.from_pretrained(make_model(), plugins=make_plugins(make_model()), source_r=0)
    frozen_layer(model, training)
    before = modes(model)
    JOBS[job](model)
    assert modes(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_distillation_gives_every_part_back_in_its_mode(training):
    model = frozen_layer(make_model(), training)
    before = modes(model)
    distill(model, IMAGES, ARGUMENTS)
    assert modes(model) == before


def test_a_job_on_a_composed_model_in_training_mode_does_not_warn_of_training(caplog):
    """The warning is for whoever calls `train` on composed weights; a job that comes back to them did not."""
    model = TocomModel.from_pretrained(make_model(), plugins=make_plugins(make_model()), source_r=0)
    model.train()
    model.set_target_r(2)
    pick_scale(model, IMAGES, 2, scales=[0.1])
    evaluate_degrees(model, IMAGES, [2], batch_size=4)
    assert "Before training" not in caplog.text
    model.train()
    assert "Before training" in caplog.text
