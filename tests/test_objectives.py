# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What is compared is what heads of each family read."""

import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import make_model
from families import FAMILIES

from tocom_hf import ArgumentError, UnsupportedModelError
from tocom_hf.inputs import model_inputs
from tocom_hf.objectives import OBJECTIVES, find_objective


def by_class(model_class):
    return next(family for family in FAMILIES if family.model_class is model_class)


def test_logits_are_compared_by_kl_divergence():
    teacher, student = torch.randn(6, 5).log_softmax(-1), torch.randn(6, 5).log_softmax(-1)
    expected = sum((t.exp() * (t - s)).sum() for t, s in zip(teacher.double(), student.double(), strict=True)) / 6
    torch.testing.assert_close(OBJECTIVES["logits"].loss(teacher, student).double(), expected)
    same = (teacher.argmax(-1) == student.argmax(-1)).float()
    assert torch.equal(OBJECTIVES["logits"].agreement(teacher, student), same)


def test_features_are_compared_by_their_angle():
    teacher, student = F.normalize(torch.randn(6, 2, 8), dim=-1), F.normalize(torch.randn(6, 2, 8), dim=-1)
    cosine = F.cosine_similarity(teacher, student, dim=-1)
    torch.testing.assert_close(OBJECTIVES["features"].loss(teacher, student), (2 - 2 * cosine).mean())
    torch.testing.assert_close(OBJECTIVES["features"].agreement(teacher, student), cosine.mean(-1))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_features_of_every_family_have_length_one(family):
    model, inputs = family.make(), family.inputs()
    images = next(value for name, value in inputs.items() if name in ("pixel_values", "input_values"))
    features = OBJECTIVES["features"].outputs(model, images)
    assert features.shape[0] == 3
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:2]))


def test_features_are_what_the_head_of_dinov2_reads():
    family = by_class(hf.Dinov2ForImageClassification)
    model, inputs = family.make(), family.inputs()
    read = []
    model.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(**inputs)
    class_token, mean = read[0].chunk(2, dim=-1)
    features = OBJECTIVES["features"].outputs(model, inputs["pixel_values"])
    torch.testing.assert_close(features[:, 0], F.normalize(class_token, dim=-1))
    torch.testing.assert_close(features[:, 1], F.normalize(mean, dim=-1))


def test_features_of_mae_do_not_depend_on_its_random_shuffling():
    family = by_class(hf.ViTMAEModel)
    model, images = family.make(), family.inputs()["pixel_values"]
    features = [OBJECTIVES["features"].outputs(model, images) for _ in range(2)]
    assert torch.equal(*features)


def test_images_of_another_size_are_taken_where_the_model_can():
    features = OBJECTIVES["features"].outputs(make_model(), torch.randn(2, 3, 48, 48))
    assert features.shape == (2, 1, 32)


def test_auto_goes_by_the_classifier():
    model = make_model()
    assert find_objective("auto", model).name == "logits"
    assert find_objective("auto", model.vit).name == "features"
    assert find_objective("features", model).name == "features"


def test_wrong_objectives_are_refused():
    with pytest.raises(ArgumentError, match="auto, logits, features"):
        find_objective("labels", make_model())
    with pytest.raises(UnsupportedModelError, match="no classifier"):
        find_objective("logits", make_model().vit)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.audio], ids=str)
def test_models_that_can_are_asked_to_interpolate_positions(family):
    """Also where the configuration has its image size in a part of it, as SigLIP's."""
    model = family.make()
    takes_any_size = "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters
    assert ("interpolate_pos_encoding" in model_inputs(model, torch.zeros(1, 3, 48, 48))) == takes_any_size
    assert "interpolate_pos_encoding" not in model_inputs(model, torch.zeros(1, 3, 32, 32))
