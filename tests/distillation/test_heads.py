# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What is compared of a head goes by what its outputs mean: one label of several, any labels, or values."""

import pytest
import torch
import transformers as hf
from helpers.distillation import ARGUMENTS, Noise
from helpers.families import COMMON, clip
from helpers.models import make_model, make_plugins

from tocom_hf import (
    DistillationArguments,
    TocomModel,
    UnsupportedModelError,
    apply_tome,
    distill,
    fit_scales,
    pick_scale,
)
from tocom_hf.distillation.heads import HEADS, has_head
from tocom_hf.distillation.objectives import find_objective


SEVERAL = {"problem_type": "regression", "num_labels": 2}
ANY = {"problem_type": "multi_label_classification", "num_labels": 5}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "logits"),
        ({"num_labels": 1}, "values"),
        (SEVERAL, "values"),
        (ANY, "label_probabilities"),
        ({"problem_type": "multi_label_classification", "num_labels": 1}, "label_probabilities"),
        ({"problem_type": "single_label_classification"}, "logits"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "logits"])
def test_the_objective_goes_by_what_the_head_means(settings, name, asked):
    assert find_objective(asked, make_model(**settings)).name == name


def test_a_head_that_does_nothing_is_none():
    """With no labels transformers builds an identity, whose outputs are features."""
    model = hf.ViTForImageClassification(hf.ViTConfig(**{**COMMON, "num_labels": 0}))
    assert not has_head(model)
    assert find_objective("auto", model).name == "features"
    with pytest.raises(UnsupportedModelError, match="has no classifier"):
        find_objective("logits", model)


def test_an_unknown_problem_type_is_named():
    with pytest.raises(UnsupportedModelError, match="problem_type is 'ranking', which is none of single_label"):
        find_objective("auto", make_model(problem_type="ranking"))


def test_label_probabilities_are_compared_by_the_divergence_of_each():
    head = HEADS["multi_label_classification"]
    teacher, student = 3 * torch.randn(6, 4, dtype=torch.float64), 3 * torch.randn(6, 4, dtype=torch.float64)
    expected = 0.0
    for t, s in zip(teacher.flatten().sigmoid().tolist(), student.flatten().sigmoid().tolist(), strict=True):
        pair = torch.distributions.Bernoulli(torch.tensor(t)), torch.distributions.Bernoulli(torch.tensor(s))
        expected += torch.distributions.kl_divergence(*pair).item() / 6
    assert head.loss(teacher, student).item() == pytest.approx(expected, rel=1e-6)
    assert head.loss(teacher, teacher) == 0
    alike = [sum((t > 0) == (s > 0) for t, s in zip(*rows, strict=True)) / 4
             for rows in zip(teacher.tolist(), student.tolist(), strict=True)]  # fmt: skip
    assert head.agreement(teacher, student).tolist() == pytest.approx(alike)


def test_sure_labels_do_not_overflow():
    head = HEADS["multi_label_classification"]
    teacher, student = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = head.loss(teacher, student)
    loss.backward()
    assert loss.item() == pytest.approx(400.0)
    assert student.grad.isfinite().all()


def test_values_are_compared_by_their_difference():
    head = HEADS["regression"]
    teacher, student = torch.randn(6, 2), torch.randn(6, 2)
    expected = sum((t - s) ** 2 for t, s in zip(teacher.flatten().tolist(), student.flatten().tolist(), strict=True))
    assert head.loss(teacher, student).item() == pytest.approx(expected / 6, rel=1e-5)
    found = head.agreement(torch.tensor([[2.0], [2.0], [1.0], [0.0]]), torch.tensor([[2.0], [1.0], [-1.0], [0.0]]))
    assert found.tolist() == pytest.approx([1, 2 / 3, 0, 1])


@pytest.mark.parametrize("settings", [{"num_labels": 1}, SEVERAL, ANY], ids=["one value", "two values", "any labels"])
def test_a_distillation_of_such_a_head_moves_the_plugins_and_helps(settings):
    """Softmax of one logit is 1, and hides what two logits have in common: nothing was learnt from these."""
    model = make_model(**settings)
    with torch.no_grad():
        model.classifier.weight.mul_(4)
    args = DistillationArguments(**{**ARGUMENTS, "num_train_epochs": 8, "learning_rate": 0.5, "eval_degrees": [0, 4]})
    plugins = distill(model, Noise(32), args, eval_dataset=Noise(32))
    assert plugins.config.training["mean_loss"] > 1e-4
    assert max(plugins.adapter(0)[path].lora_B.abs().max() for path in plugins.adapter(0)) > 1e-3
    images = Noise(32).images
    errors = {}
    for name, scale in (("plain", 0.0), ("tocom", plugins.config.recommended_scale)):
        with torch.no_grad():
            teacher = apply_tome(make_like(model), 0)(images).logits
            student = TocomModel.from_pretrained(
                make_like(model), plugins=plugins, source_r=0, target_r=4, scale=scale
            )(images).logits
        if settings is ANY:  # what such a head says is a probability
            teacher, student = teacher.sigmoid(), student.sigmoid()
        errors[name] = (teacher - student).square().mean().item()
    assert errors["tocom"] < 0.9 * errors["plain"]
    grid = plugins.config.training["agreement"]
    assert grid["plain"] != grid["tocom"]


def make_like(model):
    """A fresh copy of a model as transformers has it."""
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    return copied.eval()


@pytest.mark.parametrize("settings", [{"num_labels": 1}, SEVERAL, ANY], ids=["one value", "two values", "any labels"])
def test_scales_are_picked_and_fitted_by_what_the_head_means(settings, pixel_values):
    model = make_model(**settings)
    plugins = make_plugins(model, size=0.5)
    tocom = TocomModel.from_pretrained(model, plugins=plugins, source_r=0)
    images = [{"pixel_values": image} for image in pixel_values]
    scales = (0.3, 0.0, -0.3, 0.1)
    with torch.no_grad():
        teacher = tocom(pixel_values).logits
        losses = {}
        for scale in scales:
            with tocom.at(4, scale):
                student = tocom(pixel_values).logits
            if settings is ANY:
                pair = [torch.distributions.Bernoulli(logits=logits) for logits in (teacher, student)]
                losses[scale] = torch.distributions.kl_divergence(*pair).sum().item()
            else:
                losses[scale] = (teacher - student).square().sum().item()
    assert pick_scale(tocom, images, 4, scales=scales) == min(losses, key=losses.__getitem__)
    fitted = fit_scales(tocom, images, target_r=4, max_steps=5)
    changed = [not torch.equal(fitted.adapter(0)[path].lora_B, plugins.adapter(0)[path].lora_B)
               for path in plugins.adapter(0)]  # fmt: skip
    assert all(changed)
    assert fitted.config.training["objective"] == ("label_probabilities" if settings is ANY else "values")


def test_clip_with_one_output_is_a_regression_too():
    model = hf.CLIPForImageClassification(clip())
    assert find_objective("auto", model).name == "logits"
    model.config.num_labels = 1
    assert find_objective("auto", model).name == "values"
